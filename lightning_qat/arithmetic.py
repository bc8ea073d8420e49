"""The arithmetic of quantization: pure functions of tensors.

``real = scale * (integer - zero_point)``. Everything is computed in float32, rounds half to even
and saturates, as ONNX ``QuantizeLinear`` and ``DequantizeLinear`` define it, so that a trained
model and its files compute the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lightning_qat.qparams import Grid

MIN_SCALE = torch.finfo(torch.float32).tiny
"""A range too small for a normal float32 scale gets scale 1: such a tensor is zero."""

AMCT_MIN_SCALE = torch.finfo(torch.float32).eps
"""The same threshold in AMCT (1.192e-7)."""


def affine_qparams(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
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
        >>> affine_qparams(torch.tensor(-1.0), torch.tensor(1.55), Grid(-128, 127))
        (tensor(0.0100), tensor(-28.))
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = (high - low) / (grid.qmax - grid.qmin)
    scale = torch.where(scale < MIN_SCALE, torch.ones_like(scale), scale)
    return scale, zero_point_of(low, scale, grid)


def zero_point_of(low: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The integer that stands for real zero on a grid that starts at ``low``, in float32.

    Example:
        >>> zero_point_of(torch.tensor(-1.0), torch.tensor(0.01), Grid(-128, 127))
        tensor(-28.)
    """
    return torch.round(grid.qmin - low / scale).clamp(grid.qmin, grid.qmax)


def symmetric_scale(largest: Tensor, grid: Grid) -> Tensor:
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
        >>> symmetric_scale(torch.tensor(12.7), Grid(-127, 127))
        tensor(0.1000)
    """
    scale = largest / ((grid.qmax - grid.qmin) / 2)
    return torch.where(scale < MIN_SCALE, torch.ones_like(scale), scale)


def arq_scale(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
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
        >>> arq_scale(torch.tensor(-1.28), torch.tensor(1.0), Grid(-128, 127))
        tensor(0.0100)
    """
    largest = torch.maximum(low.abs(), high.abs())
    scale = torch.where(low.abs() > high.abs(), largest / -grid.qmin, largest / grid.qmax)
    return torch.where(scale < AMCT_MIN_SCALE, torch.ones_like(scale), scale)


def along_axis(values: Tensor, dims: int, axis: int | None) -> Tensor:
    """Reshape per-channel values so that they broadcast along ``axis`` of a ``dims``-d tensor."""
    if axis is None:
        return values
    shape = [1] * dims
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
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
        >>> quantize(x, scale, torch.tensor(0), Grid(-8, 7))
        tensor([-8,  1,  2], dtype=torch.int8)
    """
    return torch.clamp(torch.round(x / scale) + zero_point, grid.qmin, grid.qmax).to(grid.dtype)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Map integers back to real values, float32: ``scale * (integer - zero_point)``."""
    return (integers.to(torch.float32) - zero_point) * scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    gradient_everywhere: bool = False,
    saves_input: bool = False,
) -> Tensor:
    """Round real values to the grid and stay in real numbers.

    ``scale * (clip(round(x / scale) + zero_point, qmin, qmax) - zero_point)``, in float32 whatever
    the dtype of ``x`` or of autocast; the result has the dtype of ``x``.

    Gradient: straight-through, ``dy/dx = 1`` where the integer lies in the grid before clipping and
    0 elsewhere (Jacob et al., arXiv:1712.05877); 1 everywhere with ``gradient_everywhere``, which
    is right for a range that follows the values themselves, as a weight's does. Scale and zero
    point get none.

    Args:
        x: Real values, any shape and floating dtype.
        scale: Real size of one integer step, float32, positive. Broadcasts against ``x``.
        zero_point: Integer that stands for real zero. Broadcasts against ``x``.
        grid: The integers in use.
        gradient_everywhere: Pass the gradient of saturated values too.
        saves_input: Backward may look at ``x`` again instead of keeping a mask, which is faster on
            CPUs and free where the reader of the result keeps ``x`` anyway. ``x`` must not be
            changed in place before backward.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.

    Example:
        >>> x = torch.tensor([-9.0, 0.2, 0.625], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), Grid(-8, 7))
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-2.0000,  0.2500,  0.5000]), tensor([0., 1., 1.]))
    """
    return fake_quantizer(
        scale, zero_point, grid, gradient_everywhere=gradient_everywhere, saves_input=saves_input
    )(x)


def fake_quantizer(
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    gradient_everywhere: bool = False,
    saves_input: bool = False,
) -> Callable[[Tensor], Tensor]:
    """``fake_quantize`` for many tensors on one grid, whose ends are looked up once.

    Arguments and gradients as ``fake_quantize``.
    """
    low, high = _ends(zero_point, grid.qmin, grid.qmax)
    edges = None
    if saves_input and not gradient_everywhere and isinstance(low, float):
        edges = _edges(low, high, float(scale))

    def call(x: Tensor) -> Tensor:
        if edges is not None and x.dtype == torch.float32:
            # ATen's own node has the gradient, from x alone, without a call back into Python; its
            # result is written over.
            result: Tensor = torch.nn.functional.hardtanh(x, *edges)
            steps = torch.div(x.detach(), scale, out=result.detach()).round_()
            steps.clamp_(low, high).mul_(scale)
            return result
        result = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, low, high, gradient_everywhere
        )
        return result

    return call


class _FakeQuantize(torch.autograd.Function):
    """In-place passes over one temporary; backward needs one byte per element."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Any,
        high: Any,
        gradient_everywhere: bool,
    ) -> Tensor:
        steps = torch.div(x.to(torch.float32), scale).round_()
        inside: Tensor | None = None
        if ctx.needs_input_grad[0] and not gradient_everywhere:
            inside = steps.ge(low).logical_and_(steps.le(high))
        ctx.save_for_backward(inside)
        return steps.clamp_(low, high).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else grads[0] * inside
        return grad, None, None, None, None


def _ends(zero_point: Tensor, qmin: int, qmax: int) -> tuple[Any, Any]:
    """First and last step of a grid around real zero.

    As numbers where that costs nothing: ATen's clamp and comparisons with tensors are several times
    slower on CPUs. Elsewhere a number would wait for the device, or break a graph.
    """
    origin: Any = zero_point
    if zero_point.numel() == 1 and zero_point.device.type == "cpu" and not is_dynamo_compiling():
        origin = zero_point.item()
    return qmin - origin, qmax - origin


def _edges(low: float, high: float, scale: float) -> tuple[float, float]:
    """Between which real values, both excluded, rounding leads to the steps ``low`` to ``high``."""
    below, above = (low - 0.5) * scale, (high + 0.5) * scale
    # Ties go to the even step: they are inside where the last step is even.
    if low % 2 == 0:
        below = float(np.nextafter(np.float32(below), np.float32(-np.inf)))
    if high % 2 == 0:
        above = float(np.nextafter(np.float32(above), np.float32(np.inf)))
    return below, above


def accumulator_scale(scale_input: Tensor, scale_weight: Tensor, channels: int) -> Tensor:
    """What one unit of an integer layer's accumulator is worth, ``s_in * s_w``, in float32.

    Args:
        scale_input: Scale of the layer's input, scalar, float32.
        scale_weight: Scale of the layer's weight, float32: scalar, ``(channels,)``, or
            ``(channels / groups,)`` for a transposed convolution, whose groups share their scales.
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
