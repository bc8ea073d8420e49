"""Repeat a Q/DQ pair before a layer, where only value-preserving operators stand between."""

from __future__ import annotations

from collections.abc import Sequence

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
        pairs = pairs_behind(model.graph)
        for node in tuple(model.graph):
            if node.op_type in LAYER_TYPES and not node.domain and len(node.inputs) > 1:
                data = node.inputs[0]
                pair = None if data is None else pairs.get(data)
                moved = pair is not None and data is not pair.outputs[0]
                if data is not None and pair and moved and constant_dequantize(node.inputs[1]):
                    if data not in repeated:
                        repeated[data] = _requantized(model.graph, data, pair)
                    node.replace_input_with(0, repeated[data])
        return ir.passes.PassResult(model, modified=bool(repeated))


def pairs_behind(graph: ir.Graph) -> dict[ir.Value, ir.Node]:
    """The DequantizeLinear of an activation whose values a tensor has, its own or moved.

    Of a Concat all operands must have one scale and zero point; that of the first stands for all.
    """
    found: dict[ir.Value, ir.Node] = {}
    for node in graph:
        first = node.outputs[0] if node.outputs else None
        if first is None or node.domain:
            continue
        if node.op_type == "DequantizeLinear":
            pair = None if is_constant(node.inputs[0]) else node
        elif node.op_type == "Concat":
            pair = _pair_of_all([None if v is None else found.get(v) for v in node.inputs])
        else:
            data = node.inputs[0] if node.inputs and _keeps_values(node) else None
            pair = None if data is None else found.get(data)
        if pair is not None:
            found[first] = pair
    return found


def _pair_of_all(pairs: Sequence[ir.Node | None]) -> ir.Node | None:
    """The pair of a Concat's first operand, where those of all others have its parameters."""
    first = pairs[0] if pairs else None
    different = {id(pair): pair for pair in pairs}.values()
    if first is None or None in different:
        return None
    known = [pair for pair in different if pair is not None]
    try:
        qparams = qparams_of(first)
        same = all(undoes(pair, qparams) for pair in known)
    except CannotExpress:
        return None
    clipped = [pair.inputs[0].producer() for pair in known if pair.inputs[0] is not None]
    narrowed = any(maker is not None and maker.op_type == "Clip" for maker in clipped)
    return first if same and not narrowed else None


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
    assert anchor is not None  # pairs_behind walked through it
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
