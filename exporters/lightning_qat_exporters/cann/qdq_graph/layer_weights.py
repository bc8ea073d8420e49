"""The quantized weight and bias of a layer in a QDQ graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.cann.int4_packing import INPUT_AXIS, can_pack
from lightning_qat_exporters.cann.qdq_graph.constants import (
    real_constant,
    stored_integers,
    weight_dequantize,
)
from lightning_qat_exporters.cann.qdq_graph.types import (
    _INT4,
    REAL,
    GridOf,
    LayerBias,
    LayerWeight,
    Mismatch,
)


def grid_of_layer(node: ir.Node, of_node: dict[ir.Node, GridOf]) -> tuple[GridOf, ir.DataType]:
    """The grid that a layer reads, and the real type in which it reads it."""
    data, real = node.inputs[0], None
    producer = data.producer() if data is not None else None
    while producer is not None and producer.op_type in ("Identity", "Cast"):
        if producer.op_type == "Cast" and real is None:
            real = ir.DataType(producer.attributes.get_int("to", 1))
        data = producer.inputs[0]
        producer = data.producer() if data is not None else None
    quantized_weight = weight_dequantize(node.inputs[1]) is not None
    if producer is None or producer not in of_node:
        raise Mismatch(
            "its weight is quantized and its input is not"
            if quantized_weight
            else "neither its input nor its weight is quantized"
        )
    if not quantized_weight:
        raise Mismatch("its input is quantized and its weight is no quantized constant")
    grid = of_node[producer]
    if real is None:
        real = grid.real
    if real not in REAL:
        raise Mismatch(f"it must compute in float32 or float16; it computes in {real.name}")
    return grid, real


def layer_weight(node: ir.Node) -> LayerWeight:
    """Integers and scale of a layer's weight, in the layout that ``QuantizedLayer`` promises."""
    integers, scale, axis, dtype = stored_integers(node.inputs[1])
    attributes = node.attributes
    if node.op_type in ("Gemm", "MatMul"):
        if integers.ndim != 2:
            raise Mismatch(f"its weight must be a matrix; got shape {list(integers.shape)}")
        if attributes.get_int("transB", 0):
            integers, axis = integers.T, 1 - axis
    if node.op_type == "Gemm":
        factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
        if attributes.get_int("transA", 0) or factors != (1.0, 1.0):
            raise Mismatch("a quantized Gemm must have transA = 0 and alpha = beta = 1")
    channel_axis = 0 if node.op_type == "Conv" else 1
    groups = attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    channels = integers.shape[channel_axis] * groups
    if scale.size > 1:
        if axis != channel_axis:
            raise Mismatch(
                f"its weight's scales must run along the output channels (axis {channel_axis}); "
                f"they run along axis {axis}"
            )
        # ConvTranspose stores Cout/g channels: every group uses the same scales.
        scale = np.tile(scale, groups)
    groups = attributes.get_int("group", 1)
    packed = dtype == _INT4 and can_pack(integers.shape[INPUT_AXIS[node.op_type]], groups)
    return LayerWeight(integers, scale, channel_axis, channels, "INT4" if packed else "INT8")


def layer_bias(node: ir.Node, weight: LayerWeight) -> LayerBias:
    if node.op_type == "MatMul":
        return _added_bias(node, weight.channels)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return LayerBias(None, None)
    real = real_constant(node.inputs[2])
    if real is None:
        raise Mismatch("its bias must be a constant")
    if real.size not in (1, weight.channels) or (real.ndim and real.shape[-1] != real.size):
        raise Mismatch(f"its bias must be one number per output channel; got {list(real.shape)}")
    return LayerBias(np.broadcast_to(real.reshape(-1), (weight.channels,)), None)


def _added_bias(node: ir.Node, channels: int) -> LayerBias:
    """The bias of a linear layer on more than two dimensions: MatMul, then Add of a constant."""
    consumers = list(node.outputs[0].consumers())
    if len(consumers) == 1 and consumers[0].op_type == "Add":
        for value in _others(consumers[0], node.outputs[0]):
            real = real_constant(value)
            if real is not None and real.shape[-1:] == (channels,) and real.size == channels:
                return LayerBias(real.reshape(-1), consumers[0])
    return LayerBias(None, None)


def _others(node: ir.Node, value: ir.Value) -> Iterator[ir.Value]:
    for other in node.inputs:
        if other is not None and other is not value:
            yield other
