"""A convolution or matrix product of a QDQ graph: its quantized input, weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.int4_packing import INPUT_AXIS, can_pack
from lightning_qat_exporters.cann.qdq_graph.activations import PairGroup
from lightning_qat_exporters.cann.qdq_graph.qparams import first_unusable, usable_scale
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import (
    constant_dequantize,
    constant_integers,
    real_constant,
)
from lightning_qat_exporters.cann.qdq_graph.types import REAL_TYPES, UnusableValues, WtsType

_INT4 = ir.DataType.INT4.numpy()
_INT8 = np.iinfo(np.int8)

WHY_REAL = "lightning_qat.why_real"
"""Where a tensor's ``meta`` says why it became real although the file quantizes it."""


class LayerWeight(NamedTuple):
    """A layer's weight in the layout that ``IntegerLayer`` promises.

    Args:
        integers: ``q - zero_point``; they need not fit int8.
        scale: The scale, of length 1 or ``channels``.
        channel_axis: Axis of the output channels in ``integers``.
        channels: Number of output channels.
        wts_type: ``INT4`` where the model stores the weight as such and two fit into a byte.
    """

    integers: NDArray[np.integer[Any]]
    scale: NDArray[np.float32]
    channel_axis: int
    channels: int
    wts_type: WtsType


class LayerBias(NamedTuple):
    """A layer's real bias, or None, and the Add that brings it to a MatMul."""

    real: Array | None
    add: ir.Node | None


class LayerParts(NamedTuple):
    """What an integer layer consists of; ``real`` is the type of its output."""

    input: PairGroup
    real: ir.DataType
    weight: LayerWeight
    bias: LayerBias


def read_layer(node: ir.Node, group_of: Mapping[ir.Node, PairGroup]) -> LayerParts:
    """Read a compute node as an integer layer.

    Args:
        node: A node of one of ``LAYER_TYPES``.
        group_of: The group of every activation's DequantizeLinear.

    Raises:
        CannotExpress: It stays real: its input or weight is not quantized, or not as integer
            layers want it.
        UnusableValues: It is quantized, and its values have no integer form.
    """
    group, real = _layer_input(node, group_of)
    weight = read_weight(node)
    _require_usable(weight, group)
    return LayerParts(group, real, weight, _read_bias(node, weight.channels))


def read_weight(node: ir.Node) -> LayerWeight:
    """Integers and scale of a layer's weight.

    Raises:
        CannotExpress: The weight is not quantized as integer layers want it.
        UnusableValues: It holds NaN or infinity.
    """
    integers, scale, axis, dtype = constant_integers(node.inputs[1])
    attributes = node.attributes
    if node.op_type in ("Gemm", "MatMul"):
        if integers.ndim != 2:
            raise CannotExpress(f"its weight must be a matrix; got shape {list(integers.shape)}")
        if attributes.get_int("transB", 0):
            integers, axis = integers.T, 1 - axis
    elif integers.ndim < 3:
        raise CannotExpress(
            f"its weight must have two axes and one or more of a window; got shape "
            f"{list(integers.shape)}"
        )
    if node.op_type == "Gemm":
        alpha_beta = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
        if attributes.get_int("transA", 0) or alpha_beta != (1.0, 1.0):
            raise CannotExpress("a quantized Gemm must have transA = 0 and alpha = beta = 1")
    channel_axis = 0 if node.op_type == "Conv" else 1
    groups = attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    channels = integers.shape[channel_axis] * groups
    if scale.size > 1:
        # Of a depthwise layer the rows are the output channels too.
        by_row = groups > 1 and channels == integers.shape[0] and axis == 0
        if axis != channel_axis and not by_row:
            raise CannotExpress(
                f"its weight's scales must run along the output channels (axis {channel_axis}); "
                f"they run along axis {axis}",
                "Quantize transposed convolutions along axis 1 (ModelOpt: 'axis': 1 of their "
                "weight_quantizer), or per tensor"
                if node.op_type == "ConvTranspose"
                else "Quantize along the output channels, or per tensor",
            )
        # ConvTranspose stores Cout/g channels: scales along them are those of every group.
        scale = np.tile(scale, channels // scale.size)
    groups = attributes.get_int("group", 1)
    packed = dtype == _INT4 and can_pack(integers.shape[INPUT_AXIS[node.op_type]], groups)
    return LayerWeight(integers, scale, channel_axis, channels, "INT4" if packed else "INT8")


def _layer_input(
    node: ir.Node, group_of: Mapping[ir.Node, PairGroup]
) -> tuple[PairGroup, ir.DataType]:
    """The quantized input of a layer, and the real type in which it reads it."""
    data, real = node.inputs[0], None
    producer = data.producer() if data is not None else None
    while producer is not None and producer.op_type in ("Identity", "Cast"):
        if producer.op_type == "Cast" and real is None:
            real = ir.DataType(producer.attributes.get_int("to", 1))
        data = producer.inputs[0]
        producer = data.producer() if data is not None else None
    quantized_weight = constant_dequantize(node.inputs[1]) is not None
    if producer is None or producer not in group_of:
        why = None if data is None else data.meta.get(WHY_REAL)
        if quantized_weight and why is not None:
            raise CannotExpress(why, "Quantize activations per tensor")
        raise CannotExpress(
            "its weight is quantized and its input is not"
            if quantized_weight
            else "neither its input nor its weight is quantized"
        )
    if not quantized_weight:
        raise CannotExpress("its input is quantized and its weight is no quantized constant")
    group = group_of[producer]
    if real is None:
        real = group.real
    if real not in REAL_TYPES:
        raise CannotExpress(f"it must compute in float32 or float16; it computes in {real.name}")
    return group, real


def _require_usable(weight: LayerWeight, group: PairGroup) -> None:
    integers, scale = weight.integers, weight.scale
    if integers.size and not (_INT8.min <= integers.min() and integers.max() <= _INT8.max):
        raise UnusableValues(
            f"the weight's integers must fit int8; they run from {integers.min()} to "
            f"{integers.max()}",
            "Quantize the weight with 8 bits or fewer",
        )
    product = group.scale * scale
    for what, values in (("the weight's scales", scale), ("scale_d * scale_w", product)):
        if not usable_scale(values):
            raise UnusableValues(
                f"{what} must be positive normal float32; got {first_unusable(values)!r}",
                "Quantize the layer again, or leave it real",
            )


def _read_bias(node: ir.Node, channels: int) -> LayerBias:
    if node.op_type == "MatMul":
        return _added_bias(node, channels)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return LayerBias(None, None)
    real = real_constant(node.inputs[2])
    if real is None:
        raise CannotExpress("its bias must be a constant")
    if real.size not in (1, channels) or (real.ndim and real.shape[-1] != real.size):
        raise CannotExpress(
            f"its bias must be one number per output channel; got {list(real.shape)}"
        )
    return LayerBias(np.broadcast_to(real.reshape(-1), (channels,)), None)


def _added_bias(node: ir.Node, channels: int) -> LayerBias:
    """The bias of a linear layer on more than two dimensions: MatMul, then Add of a constant."""
    output = node.outputs[0]
    consumers = list(output.consumers())
    if len(consumers) == 1 and consumers[0].op_type == "Add":
        for value in consumers[0].inputs:
            real = None if value is output else real_constant(value)
            if real is not None and real.shape[-1:] == (channels,) and real.size == channels:
                return LayerBias(real.reshape(-1), consumers[0])
    return LayerBias(None, None)
