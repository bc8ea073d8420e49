"""The arithmetic of quantization: pure functions of tensors.

``real = scale * (integer - zero_point)``. Everything is computed in float32, rounds half to even
and saturates, as ONNX ``QuantizeLinear`` and ``DequantizeLinear`` define it, so that a trained
model and its files compute the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.numerics.qparams import IntegerGrid

MIN_SCALE = torch.finfo(torch.float32).tiny
"""A range too small for a normal float32 scale gets scale 1: such a tensor is zero."""

AMCT_MIN_SCALE = torch.finfo(torch.float32).eps
"""The same threshold in AMCT (1.192e-7)."""


def affine_qparams(low: Tensor, high: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an affine grid that covers ``[low, high]`` and zero.

    ``scale = (max(high, 0) - min(low, 0)) / (qmax - qmin)`` and
    ``zero_point = round(qmin - min(low, 0) / scale)``: real zero falls on an integer, so zero
    padding and relu are exact. AMCT and torch's observers use the same rule.

    Args:
        low: Smallest real value, any shape, float32.
        high: Largest real value, the shape of ``low``.
        grid: The integers in use.

    Returns:
        ``scale`` (float32) and ``zero_point`` (float32 holding integers), the shape of ``low``.

    Example:
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(1.55), IntegerGrid(-128, 127))
        (tensor(0.0100), tensor(-28.))
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    # By halves, which changes no bit: the width of a range may be beyond float32.
    width = torch.sub(high * 0.5, low, alpha=0.5)
    scale = _usable(_divided(width, (grid.qmax - grid.qmin) / 2))
    return scale, zero_point_of(low, scale, grid)


def _divided(x: Tensor, number: float) -> Tensor:
    """The quotient, rounded once on every device.

    CUDA's division by a number multiplies with its reciprocal instead, which is off by one bit now
    and then: a range would have another scale there than in the file.
    """
    return x / number if x.is_cpu or is_compiling() else x / x.new_full((), number)


def zero_point_of(low: Tensor, scale: Tensor, grid: IntegerGrid) -> Tensor:
    """The integer that stands for real zero on a grid that starts at ``low``, in float32.

    Example:
        >>> zero_point_of(torch.tensor(-1.0), torch.tensor(0.01), IntegerGrid(-128, 127))
        tensor(-28.)
    """
    return torch.round(grid.qmin - low / scale).clamp(grid.qmin, grid.qmax)


def symmetric_scale(largest: Tensor, grid: IntegerGrid) -> Tensor:
    """Scale of a symmetric grid (zero point 0) for values within ``[-largest, largest]``.

    ``scale = largest / ((qmax - qmin) / 2)``: for -127..127 the largest value lands on 127; for
    -8..7 it lands on 7.5, half a step of saturation on either side, so that all 16 levels are
    used (the rule of torch's symmetric observers). For a grid of odd count the rule is
    equivariant, which makes batch-norm folding exact.

    Args:
        largest: Largest absolute value, any shape, float32, not negative.
        grid: The integers in use.

    Returns:
        The scale, float32, the shape of ``largest``.

    Example:
        >>> symmetric_scale(torch.tensor(12.7), IntegerGrid(-127, 127))
        tensor(0.1000)
    """
    return _usable(_divided(largest, (grid.qmax - grid.qmin) / 2))


def _usable(scale: Tensor) -> Tensor:
    """A new scale, with 1 in the place of those below ``MIN_SCALE``."""
    return scale.masked_fill_(scale < MIN_SCALE, 1.0)


def range_qparams(
    low: Tensor, high: Tensor, grid: IntegerGrid, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers a range.

    Args:
        low: Smallest real value, any shape, float32.
        high: Largest real value, the shape of ``low``.
        grid: The integers in use.
        symmetric: The zero point is 0 and the larger end touches ``grid.qmax``
            (``symmetric_scale``); otherwise ``affine_qparams``.

    Returns:
        ``scale`` and ``zero_point`` (float32 holding integers), the shape of ``low``.

    Example:
        >>> range_qparams(torch.tensor(-1.0), torch.tensor(1.27), IntegerGrid.signed(8), True)
        (tensor(0.0100), tensor(0.))
    """
    if not symmetric:
        return affine_qparams(low, high, grid)
    scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), grid.symmetric)
    return scale, torch.zeros_like(scale)


def arq_scale(low: Tensor, high: Tensor, grid: IntegerGrid) -> Tensor:
    """AMCT's scale of a weight (ARQ): the side that reaches farther touches its end of the grid.

    ``max|w| / qmax``, or ``max|w| / -qmin`` where ``|low| > |high|``; below 1.192e-7 it is 1.
    Source: AMCT's retrain algorithm ARQ, observed in the files it writes.

    Args:
        low: Smallest weight, any shape, float32.
        high: Largest weight, the shape of ``low``.
        grid: The integers in use, -128..127 in AMCT.

    Returns:
        The scale, float32, the shape of ``low``.

    Example:
        >>> arq_scale(torch.tensor(-1.28), torch.tensor(1.0), IntegerGrid(-128, 127))
        tensor(0.0100)
    """
    largest = torch.maximum(low.abs(), high.abs())
    of_low, of_high = _divided(largest, -grid.qmin), _divided(largest, grid.qmax)
    scale = torch.where(low.abs() > high.abs(), of_low, of_high)
    return torch.where(scale < AMCT_MIN_SCALE, torch.ones_like(scale), scale)


def along_axis(values: Tensor, dims: int, axis: int | None) -> Tensor:
    """Reshape per-channel values so that they broadcast along ``axis`` of a ``dims``-d tensor."""
    if axis is None:
        return values
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def along_channels(scale: Tensor, shape: tuple[int, ...], axis: int | None) -> Tensor:
    """Reshape the scales of a weight so that they broadcast against it.

    Args:
        scale: A scalar, or one per output channel: as many as ``axis`` is long, or, for the weight
            of a transposed convolution ``(in, out / groups, ...)``, ``(out,)``, group by group.
        shape: The weight's.
        axis: The output channels' axis; ``None``: ``scale`` is a scalar.

    Example:
        >>> along_channels(torch.tensor([1.0, 2.0, 3.0, 4.0]), (4, 2), 1)
        tensor([[1., 2.],
                [1., 2.],
                [3., 4.],
                [3., 4.]])
    """
    groups = channel_groups(scale, shape, axis)
    if groups == 1:
        return along_axis(scale, len(shape), axis)
    rows = scale.reshape(groups, shape[1]).repeat_interleave(shape[0] // groups, 0)
    return rows.reshape(shape[0], shape[1], *[1] * (len(shape) - 2))


def channel_groups(scale: Tensor, shape: tuple[int, ...], axis: int | None) -> int:
    """The groups of a weight whose rows have scales of their own; see ``along_channels``."""
    return 1 if axis is None else max(scale.numel() // max(shape[axis], 1), 1)


def channels_first(weight: Tensor, groups: int) -> Tensor:
    """A grouped transposed convolution's weight as a convolution's: output channels first.

    Args:
        weight: ``(in, out / groups, *kernel)``, the inputs of a group together.
        groups: As in torch.

    Returns:
        ``(out, in / groups, *kernel)``; of a depthwise layer the very memory.

    Example:
        >>> channels_first(torch.tensor([[1, 2], [3, 4]]), 2)
        tensor([[1],
                [2],
                [3],
                [4]])
    """
    inputs, outputs, *kernel = weight.shape
    blocks = weight.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    return blocks.reshape(groups * outputs, inputs // groups, *kernel)


def channels_second(weight: Tensor, groups: int) -> Tensor:
    """The inverse of ``channels_first``."""
    outputs, inputs, *kernel = weight.shape
    blocks = weight.reshape(groups, outputs // groups, inputs, *kernel).transpose(1, 2)
    return blocks.reshape(groups * inputs, outputs // groups, *kernel)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid) -> Tensor:
    """Map real values to the integer grid: ``clip(round(x / scale) + zero_point)``.

    Args:
        x: Real values, any shape, float32.
        scale: Real size of one integer step, positive. Broadcasts against ``x``.
        zero_point: Integer that stands for real zero. Broadcasts against ``x``.
        grid: The integers in use.

    Returns:
        Integers in the grid's dtype, the shape of ``x``.

    Example:
        >>> x, scale = torch.tensor([-9.0, 0.2, 0.625]), torch.tensor(0.25)
        >>> quantize(x, scale, torch.tensor(0), IntegerGrid(-8, 7))
        tensor([-8,  1,  2], dtype=torch.int8)
    """
    return torch.clamp(torch.round(x / scale) + zero_point, grid.qmin, grid.qmax).to(grid.dtype)


def rounded(x: Tensor, scale: Tensor, zero_point: Tensor | float, grid: IntegerGrid) -> Tensor:
    """Round real values to the grid and stay in real numbers: quantize and dequantize, float32.

    The plain formula without a gradient of its own; ``fake_quantize`` is the one for training.

    Args:
        x: Real values, any shape, float32.
        scale: Real size of one integer step, positive. Broadcasts against ``x``.
        zero_point: Integer that stands for real zero. Broadcasts against ``x``.
        grid: The integers in use.

    Example:
        >>> rounded(torch.tensor([-9.0, 0.2]), torch.tensor(0.25), 0.0, IntegerGrid(-8, 7))
        tensor([-2.0000,  0.2500])
    """
    integers = torch.clamp(torch.round(x / scale) + zero_point, grid.qmin, grid.qmax)
    return (integers - zero_point) * scale


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Map integers back to real values, float32: ``scale * (integer - zero_point)``."""
    return (integers.to(torch.float32) - zero_point) * scale


def accumulator_scale(scale_input: Tensor, scale_weight: Tensor, channels: int) -> Tensor:
    """What one unit of an integer layer's accumulator is worth, ``s_in * s_w``, in float32.

    Args:
        scale_input: Scale of the layer's input, scalar, float32.
        scale_weight: Scale of the layer's weight, float32: scalar, ``(channels,)``, or
            ``(channels / groups,)`` for a transposed convolution of an earlier version, whose
            groups share their scales.
        channels: Channels of the layer's output.

    Returns:
        Shape ``(channels,)``.

    Example:
        >>> accumulator_scale(torch.tensor(0.5), torch.tensor([1.0, 2.0]), 4)
        tensor([0.5000, 1.0000, 0.5000, 1.0000])
    """
    step = (scale_input * scale_weight).reshape(-1)
    return step.repeat(channels // len(step))


def quantize_bias(bias: Tensor, scale_input: Tensor, scale_weight: Tensor) -> Tensor:
    """The bias on the grid of an integer layer's accumulator: ``round(b / (s_in * s_w))``.

    The product of the scales is taken in float32 and the division in float64, as AMCT does; ties
    go to even.

    Args:
        bias: Real bias, ``(channels,)``, float32.
        scale_input: Scale of the layer's input, scalar, float32.
        scale_weight: Scale of the layer's weight, float32; see ``accumulator_scale``.

    Returns:
        Integers, int64, not clipped: a target that stores int32 must check them.

    Example:
        >>> quantize_bias(torch.tensor([1.0]), torch.tensor(0.5), torch.tensor([0.25]))
        tensor([8])
    """
    step = accumulator_scale(scale_input, scale_weight, len(bias)).to(torch.float64)
    return torch.round(bias.to(torch.float64) / step).to(torch.int64)
