"""The integer operators of a lowered graph: torch operators with the scale of their output.

torch's own quantized operators cannot express every TFLite kernel: a mean, a pool or an activation
there keeps the scale of its input, a linear layer's weight has one scale in the
converter, and a bias is rounded in float32. Each operator here reads and returns ``quint8``
tensors, has the output's ``scale`` and ``zero_point`` as arguments, and is computed by its
definition: dequantize, compute in float, quantize. ``converters`` maps each one to a TFLite
operator; only constant folding uses the values computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.numerics.arithmetic import along_axis

NAMESPACE = "lightning_qat_tinynn"

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "relu_n1_to_1": lambda x: x.clamp(-1.0, 1.0),
}
"""Functions that a TFLite kernel can fuse: applied to its result before rounding."""

BINARY: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "matmul": torch.matmul,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
}

UNARY: Mapping[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "elu": F.elu,
}
"""Functions of one value; ``none`` requantizes."""

EXTREMES: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "amax": torch.amax,
    "amin": torch.amin,
}
"""Functions that choose among values; their output has the scale of their input."""


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return torch.quantize_per_tensor(x.contiguous(), scale, zero_point, torch.quint8)


def _real(weight: Tensor, weight_scale: Tensor) -> Tensor:
    return weight * along_axis(weight_scale, weight.dim(), 0 if weight_scale.dim() else None)


def _real_bias(x: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias * (weight_scale * x.q_scale())


@torch.library.custom_op(f"{NAMESPACE}::convolve", mutates_args=())
def convolve(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    scale: float,
    zero_point: int,
    key: str,
) -> Tensor:
    """A convolution over height and width.

    Args:
        x: ``quint8``, ``(batch, channels, height, width)``.
        weight: ``int8``, ``(out_channels, channels / groups, height, width)``.
        weight_scale: A scalar, or ``(out_channels,)``.
        bias: ``int32`` of scale ``scale_x * scale_weight``, ``(out_channels,)``.
        stride: Per axis.
        padding: Per axis, on both sides.
        dilation: Per axis.
        groups: As in torch.
        activation: A name in ``ACTIVATIONS``.
        scale: The output's scale.
        zero_point: The output's zero point, 0 .. 255.
        key: The weight's key: its name in the file.
    """
    real = F.conv2d(
        x.dequantize(),
        _real(weight, weight_scale),
        _real_bias(x, weight_scale, bias),
        list(stride),
        list(padding),
        list(dilation),
        groups,
    )
    return _quantize(ACTIVATIONS[activation](real), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::transpose_convolve", mutates_args=())
def transpose_convolve(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    size: Sequence[int],
    scale: float,
    zero_point: int,
    key: str,
) -> Tensor:
    """A transposed convolution over height and width without padding.

    Args:
        x: ``quint8``, ``(batch, channels, height, width)``.
        weight: ``int8``, ``(channels, out_channels, height, width)``.
        weight_scale: A scalar, or ``(out_channels,)``.
        bias: ``int32`` of scale ``scale_x * scale_weight``, ``(out_channels,)``.
        stride: Per axis.
        size: Of the output; what lies behind the last window holds the bias alone.
        scale: The output's scale.
        zero_point: The output's zero point, 0 .. 255.
        key: The weight's key: its name in the file.
    """
    real = weight * along_axis(weight_scale, 4, 1 if weight_scale.dim() else None)
    found = F.conv_transpose2d(x.dequantize(), real, None, list(stride))
    whole = found.new_zeros(*found.shape[:2], *size)
    whole[tuple(slice(n) for n in found.shape)] = found
    added = _real_bias(x, weight_scale, bias)
    return _quantize(whole if added is None else whole + added.reshape(-1, 1, 1), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str,
    scale: float,
    zero_point: int,
    key: str,
) -> Tensor:
    """A linear layer over the last axis; arguments as in ``convolve``."""
    real = F.linear(x.dequantize(), _real(weight, weight_scale), _real_bias(x, weight_scale, bias))
    return _quantize(ACTIVATIONS[activation](real), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::binary", mutates_args=())
def binary(
    x: Tensor, y: Tensor, function: str, activation: str, scale: float, zero_point: int
) -> Tensor:
    """A function of two tensors, by its name in ``BINARY``."""
    real = BINARY[function](x.dequantize(), y.dequantize())
    return _quantize(ACTIVATIONS[activation](real), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::unary", mutates_args=())
def unary(x: Tensor, function: str, scale: float, zero_point: int) -> Tensor:
    """A function of each value, by its name in ``UNARY``."""
    return _quantize(UNARY[function](x.dequantize()), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::leaky_relu", mutates_args=())
def leaky_relu(x: Tensor, slope: float, scale: float, zero_point: int) -> Tensor:
    """``x`` where it is positive, ``slope * x`` elsewhere."""
    return _quantize(F.leaky_relu(x.dequantize(), slope), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::softmax", mutates_args=())
def softmax(x: Tensor, axis: int, scale: float, zero_point: int) -> Tensor:
    """Softmax along one axis, counted from 0."""
    return _quantize(torch.softmax(x.dequantize(), axis), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::mean", mutates_args=())
def mean(x: Tensor, axes: Sequence[int], keepdim: bool, scale: float, zero_point: int) -> Tensor:
    """The mean over some axes, counted from 0."""
    return _quantize(x.dequantize().mean(list(axes), keepdim), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::extreme", mutates_args=())
def extreme(
    x: Tensor, axes: Sequence[int], keepdim: bool, function: str, scale: float, zero_point: int
) -> Tensor:
    """The largest or smallest values over some axes, counted from 0; ``EXTREMES`` names which."""
    return _quantize(EXTREMES[function](x.dequantize(), list(axes), keepdim), scale, zero_point)


@torch.library.custom_op(f"{NAMESPACE}::average_pool", mutates_args=())
def average_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_padding: bool,
    scale: float,
    zero_point: int,
) -> Tensor:
    """Means over windows of a picture. Its kernels have one scale for input and output."""
    real = F.avg_pool2d(
        x.dequantize(),
        list(kernel),
        list(stride),
        list(padding),
        count_include_pad=count_padding,
    )
    return _quantize(real, scale, zero_point)


OPS: Any = getattr(torch.ops, NAMESPACE)
