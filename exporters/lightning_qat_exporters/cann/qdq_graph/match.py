"""The quantized part of a QDQ graph, read once: which layers compute with integers, and on which.

Matches structure, never names: ``QuantizeLinear -> [Clip] -> DequantizeLinear`` before a
convolution or a matrix product whose weight is ``DequantizeLinear`` of constant integers. Says what
the numbers are and changes nothing; how a target spells them is left to the target's own module.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.cann.qdq_graph.constants import (
    array_of,
    check_constant,
    factors_of,
    is_constant,
    require_usable,
    same_factors,
    usable_scale,
    weight_dequantize,
)
from lightning_qat_exporters.cann.qdq_graph.layer_weights import (
    grid_of_layer,
    layer_bias,
    layer_weight,
)
from lightning_qat_exporters.cann.qdq_graph.names import label, unique
from lightning_qat_exporters.cann.qdq_graph.types import (
    COMPUTE_OPS,
    DEVICE_REMEDY,
    GRIDS,
    REAL,
    RECURRENT_OPS,
    VALUE_PRESERVING,
    GridOf,
    LayerBias,
    LayerWeight,
    Mismatch,
    QuantizedGraph,
    QuantizedLayer,
    Remark,
    Unfit,
    of_tensor,
    type_range,
)


def find_quantized(model: ir.Model) -> QuantizedGraph:
    """Find the quantized tensors and layers of a QDQ model; the model stays as it is.

    Pairs that read the same tensor with the same scale, zero point, type and range are one
    ``Activation``. Layers with equal node names get ``name``, ``name_1``, and so on.

    Args:
        model: The QDQ model. Functions must be inlined; subgraphs are not searched.

    Returns:
        The findings. Nothing is raised: what cannot be expressed is listed in ``problems``.
    """
    problems: list[Remark] = []
    grids: dict[tuple[Any, ...], GridOf] = {}
    of_node: dict[ir.Node, GridOf] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and not is_constant(node.inputs[0]):
            try:
                pair = _activation_pair(node)
            except Mismatch as mismatch:
                problems.append(of_tensor(node, mismatch))
                continue
            grid = grids.setdefault(pair.key, pair)
            if grid is not pair:
                grid.quantizes += pair.quantizes
                grid.dequantizes += pair.dequantizes
            of_node.update(dict.fromkeys(pair.dequantizes, grid))
        elif weight_dequantize(node.outputs[0]) is node:
            try:
                check_constant(node)
            except Mismatch as mismatch:
                problems.append(of_tensor(node, mismatch))
        elif node.op_type == "DequantizeLinear" and _unpaired(node):
            unpaired = Mismatch("no QuantizeLinear makes the integers it reads")
            problems.append(of_tensor(node, unpaired))

    left_float: list[Remark] = []
    found: list[tuple[str, ir.Node, GridOf, ir.DataType, LayerWeight, LayerBias]] = []
    names: set[str] = set()
    for node in model.graph:
        if node.op_type not in COMPUTE_OPS or node.domain:
            passes_on = node.op_type in (*VALUE_PRESERVING, "DequantizeLinear")
            if not passes_on and any(weight_dequantize(v) is not None for v in node.inputs):
                remedy = DEVICE_REMEDY if node.op_type in RECURRENT_OPS else ""
                reason = f"{node.op_type} keeps real weights"
                left_float.append(Remark(label(node), reason, remedy))
            continue
        try:
            layer_grid, real = grid_of_layer(node, of_node)
            weight = layer_weight(node)
            require_usable(weight, layer_grid)
            bias = layer_bias(node, weight)
        except Unfit as unfit:
            problems.append(Remark(label(node), *unfit.args))
        except Mismatch as mismatch:
            left_float.append(Remark(label(node), *mismatch.args))
        else:
            name = unique(label(node), names)
            layer_grid.reader = layer_grid.reader or name
            found.append((name, node, layer_grid, real, weight, bias))

    names = set()
    activations = {id(grid): grid.finished(names) for grid in grids.values()}
    layers = tuple(
        QuantizedLayer(
            name=name,
            node=node,
            activation=activations[id(grid)],
            weight=weight.integers.astype(np.int8, copy=False),
            scale_w=weight.scale,
            channel_axis=weight.channel_axis,
            bias=bias.real,
            add=bias.add,
            real=real,
            wts_type=weight.wts_type,
        )
        for name, node, grid, real, weight, bias in found
    )
    return QuantizedGraph(tuple(activations.values()), layers, tuple(left_float), tuple(problems))


def joins(found: QuantizedGraph) -> tuple[str, ...]:
    """Nodes that are no layers and read real values from a quantized tensor, each once."""
    layers = {layer.node for layer in found.layers}
    return tuple(
        dict.fromkeys(
            label(reader)
            for activation in found.activations
            for node in activation.dequantizes
            for reader in _readers(node.outputs[0])
            if reader not in layers and reader.op_type != "QuantizeLinear"
        )
    )


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a tensor, also cast or transposed."""
    for node in value.consumers():
        if node.op_type in VALUE_PRESERVING:
            yield from _readers(node.outputs[0])
        else:
            yield node


def integer_outputs(found: QuantizedGraph) -> tuple[str, ...]:
    """Graph outputs that are the integers of a quantized tensor."""
    return tuple(
        value.name or ""
        for activation in found.activations
        for node in activation.quantizes
        for value in (node.outputs[0], *(n.outputs[0] for n in node.outputs[0].consumers()))
        if value.is_graph_output() and value.producer() not in activation.dequantizes
    )


def _unpaired(dequantize: ir.Node) -> bool:
    """Whether integers come from elsewhere than a QuantizeLinear or a constant."""
    value = dequantize.inputs[0]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Clip":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return not is_constant(value) and (node is None or node.op_type != "QuantizeLinear")


def _activation_pair(quantize: ir.Node) -> GridOf:
    """Read one QuantizeLinear of an activation with everything that hangs on its integers.

    Raises:
        Mismatch: The pair is none: several factors, other readers, other types.
    """
    scale, zero_point, dtype = factors_of(quantize)
    if scale.size != 1 or zero_point.size != 1:
        raise Mismatch(
            f"an activation must have one scale and one zero point; got {scale.size} scales and "
            f"{zero_point.size} zero points",
            "Quantize activations per tensor",
        )
    if dtype not in GRIDS:
        raise Mismatch(
            f"activations must be int8, uint8, int16 or uint16; got {dtype}",
            "Quantize the activation with 8 or 16 bits",
        )
    step = np.float32(scale.reshape(()))
    if not usable_scale(step):
        raise Mismatch(
            f"a scale must be positive, and it and its reciprocal normal float32; got {step!r}",
            "Calibrate the tensor again, or leave it real",
        )
    real = ir.DataType.from_numpy(scale.dtype)
    if real not in REAL:
        raise Mismatch(
            f"the tensor must be float32 or float16; its scale is {real.name}",
            "Convert the model to one of the two",
        )
    dst_type, shift = GRIDS[dtype]
    low, high = type_range(dst_type)
    source = quantize.inputs[0]
    assert source is not None  # QuantizeLinear's first input is not optional
    integers = quantize.outputs[0]
    clips = [n for n in integers.consumers() if n.op_type == "Clip"]
    if clips:
        if len(integers.consumers()) > 1 or integers.is_graph_output():
            raise Mismatch("the integers must be read either by one Clip or by DequantizeLinear")
        bounds = [*clips[0].inputs, None, None][1:3]
        ends = [
            None if v is None else int(array_of(v, "bound of a Clip").reshape(())) for v in bounds
        ]
        low = low if ends[0] is None else max(low, ends[0] - shift)
        high = high if ends[1] is None else min(high, ends[1] - shift)
        integers = clips[0].outputs[0]
    dequantizes = list(integers.consumers())
    for node in dequantizes:
        if node.op_type != "DequantizeLinear":
            raise Mismatch(f"its integers are read by {label(node)!r} ({node.op_type})")
        other = factors_of(node)
        if not same_factors((scale, zero_point, dtype), other, typed=len(node.inputs) > 2):
            raise Mismatch(
                f"QuantizeLinear and DequantizeLinear of a pair must share scale and zero point; "
                f"{label(node)!r} has others"
            )
    return GridOf(
        source=source,
        scale=step,
        offset=int(zero_point.reshape(())) - shift,
        dst_type=dst_type,
        low=low,
        high=high,
        real=real,
        quantizes=[quantize],
        dequantizes=dequantizes,
    )
