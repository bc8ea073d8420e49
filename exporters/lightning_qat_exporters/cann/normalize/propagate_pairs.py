"""Repeat a Q/DQ pair before a layer, where only value-preserving operators stand between."""

from __future__ import annotations

import onnx_ir as ir

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.operators import LAYER_TYPES, value_preserving
from lightning_qat_exporters.cann.qdq_graph.constants import constant, is_constant
from lightning_qat_exporters.cann.qdq_graph.qparams import qparams_of, undoes
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import constant_dequantize

# Identity is eliminated before. Of a Split only the first output would be followed.
_VALUE_PRESERVING = frozenset(value_preserving("onnx")) - {"Identity", "Split"}


class PropagatePairs(ir.passes.InPlacePass):
    """Repeat a pair behind the value-preserving operators between it and a quantized layer.

    Many tools put one pair behind an activation function and none behind the pool or reshape that
    follows. The values are quantized already, so the second quantization with the same scale and
    zero point changes nothing, and the layer computes on integers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        repeated: dict[ir.Value, ir.Value] = {}
        for node in tuple(model.graph):
            if node.op_type in LAYER_TYPES and not node.domain and len(node.inputs) > 1:
                data = node.inputs[0]
                pair = _pair_before(data) if constant_dequantize(node.inputs[1]) else None
                if data is not None and pair is not None:
                    if data not in repeated:
                        repeated[data] = _requantized(model.graph, data, pair)
                    node.replace_input_with(0, repeated[data])
        return ir.passes.PassResult(model, modified=bool(repeated))


def quantized_by(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of an activation whose values a tensor has, directly or moved."""
    node = None if value is None else value.producer()
    direct = node is not None and node.op_type == "DequantizeLinear" and not node.domain
    pair = node if direct else _pair_before(value)
    return None if pair is None or is_constant(pair.inputs[0]) else pair


def _pair_before(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear whose values reach ``value`` through at least one other operator.

    Of a Concat all operands must have one scale and zero point; that of the first stands for all.
    """
    node = None if value is None else value.producer()
    steps = 0
    while node is not None and value is not None and not node.domain:
        if node.op_type == "Concat":
            return _pair_of_all(node)
        if not _keeps_values(node):
            break
        if value is not node.outputs[0]:
            return None
        value = node.inputs[0]
        node = None if value is None else value.producer()
        steps += 1
    if not steps or node is None or node.op_type != "DequantizeLinear":
        return None
    return None if is_constant(node.inputs[0]) else node


def _pair_of_all(concat: ir.Node) -> ir.Node | None:
    """The pair of a Concat's first operand, where those of all others have its parameters."""
    pairs = []
    for value in concat.inputs:
        pair = quantized_by(value)
        if pair is None:
            return None
        pairs.append(pair)
    try:
        same = all(undoes(pair, qparams_of(pairs[0])) for pair in pairs)
    except CannotExpress:
        return None
    clipped = [pair.inputs[0].producer() for pair in pairs if pair.inputs[0] is not None]
    narrowed = any(maker is not None and maker.op_type == "Clip" for maker in clipped)
    return pairs[0] if same and not narrowed else None


def _keeps_values(node: ir.Node) -> bool:
    """Whether an operator's output has values of its input, or zero, alone."""
    if node.op_type != "Pad":
        return node.op_type in _VALUE_PRESERVING
    if node.attributes.get_string("mode", "constant") != "constant":
        return False
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    value = constant(fill)
    return fill is None or (value is not None and not value.any())


def _requantized(graph: ir.Graph, value: ir.Value, pair: ir.Node) -> ir.Value:
    anchor = value.producer()
    assert anchor is not None  # _pair_before walked through it
    stored = pair.inputs[0]
    quantize = None if stored is None else stored.producer()
    clip = quantize if quantize is not None and quantize.op_type == "Clip" else None
    if clip is not None:
        unclipped = clip.inputs[0]
        quantize = None if unclipped is None else unclipped.producer()
    if stored is None or quantize is None or quantize.op_type != "QuantizeLinear":
        return value
    name = value.name or anchor.op_type
    integers = ir.Value(name=f"{name}.carried", type=stored.type)
    nodes = [
        ir.Node(
            quantize.domain,
            "QuantizeLinear",
            [value, *quantize.inputs[1:]],
            list(quantize.attributes.values()),
            outputs=[integers],
            name=f"{name}.quantize",
        )
    ]
    if clip is not None:
        narrowed = ir.Value(name=f"{name}.carried.clip", type=integers.type)
        inputs = [integers, *clip.inputs[1:]]
        nodes.append(ir.node("Clip", inputs, outputs=[narrowed], name=f"{name}.quantize.clip"))
        integers = narrowed
    real = ir.Value(name=f"{name}.carried.real", type=value.type, shape=value.shape)
    dequantize = ir.Node(
        pair.domain,
        "DequantizeLinear",
        [integers, *pair.inputs[1:]],
        list(pair.attributes.values()),
        outputs=[real],
        name=f"{name}.dequantize",
    )
    graph.insert_after(anchor, [*nodes, dequantize])
    return real
