"""Fake quantization whose step is learned with the network: LSQ, LSQ+ and AMCT's ULQ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qat.arithmetic import MIN_SCALE, along_axis, zero_point_of
from lightning_qat.qparams import Grid


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor | None,
    grid: Grid,
    *,
    axis: int | None = None,
    normalized: bool = True,
) -> Tensor:
    r"""Round real values to a grid whose scale, and lower end, receive gradients.

    .. math:: \hat x = s \cdot (\mathrm{clip}(\mathrm{round}(x / s) + z, q_{min}, q_{max}) - z)

    with :math:`z = \mathrm{round}(q_{min} - low / s)`, or 0 without ``low``. The gradient of ``x``
    is straight-through inside the range and zero outside. That of the scale is, summed over what
    shares it (LSQ, arXiv:1902.08153; LSQ+, arXiv:2004.09576, with the zero point an integer):

    * inside: :math:`\mathrm{round}(x / s) - x / s`;
    * above: :math:`q_{max} - z` without ``low``, :math:`q_{max} - q_{min}` with it;
    * below: :math:`q_{min} - z` without ``low``, 0 with it;

    and that of ``low`` is 1 outside, 0 inside. AMCT's ULQ is the same function of two clips, with
    ``scale = (clip_max - clip_min) / (qmax - qmin)`` and ``low = clip_min``.

    Args:
        x: Real values, any shape and floating dtype.
        scale: Scalar, or one per channel of ``axis``, float32, positive.
        low: Lower end of the range, scalar float32, not positive; ``None``: the zero point is 0,
            or ``grid.qmin`` for a grid that starts at real zero, by a constant ``low`` of 0.
        grid: The integers in use.
        axis: Channel axis of ``scale``.
        normalized: Divide the gradients of ``scale`` and ``low`` by ``sqrt(n * q)``, where ``n``
            values share a scale and ``q`` is the largest number of steps (``qmax``, or
            ``qmax - qmin`` with ``low``), so that one learning rate serves them and the weights.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.

    Example:
        >>> x = torch.tensor([0.3, 5.0])
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> y = learned_fake_quantize(x, scale, None, Grid(-8, 7), normalized=False)
        >>> y.sum().backward()
        >>> y.detach(), scale.grad  # (1 - 0.6) + 7
        (tensor([0.5000, 3.5000]), tensor(7.4000))
    """
    return learned_fake_quantizer(scale, low, grid, x.numel() if normalized else None, axis)(x)


def learned_fake_quantizer(
    scale: Tensor, low: Tensor | None, grid: Grid, values: int | None, axis: int | None = None
) -> Callable[[Tensor], Tensor]:
    """``learned_fake_quantize`` for many tensors on one grid, such as the steps of a sequence.

    Args:
        scale: As there.
        low: As there.
        grid: As there.
        values: Of how many values all tensors together are: ``n`` times the number of scales, by
            which gradients are normalized. ``None``: they are not.
        axis: As there.
    """
    with torch.no_grad():
        if low is None:
            zero_point = torch.zeros_like(scale)
        else:
            zero_point = zero_point_of(low, scale, grid)
    factor = 1.0
    if values is not None:
        highest = grid.qmax if low is None else grid.qmax - grid.qmin
        factor = (max(values // scale.numel(), 1) * highest) ** -0.5

    def call(x: Tensor) -> Tensor:
        result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, low, zero_point, grid.qmin, grid.qmax, axis, factor
        )
        return result

    return call


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Tensor | None,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        axis: int | None,
        factor: float,
    ) -> Tensor:
        wide, origin = (along_axis(t, x.dim(), axis) for t in (scale, zero_point))
        exact = x.to(torch.float32) / wide
        rounded = torch.round(exact)
        below, above = rounded < qmin - origin, rounded > qmax - origin
        steps = torch.clamp(rounded, qmin - origin, qmax - origin)
        inside = ~(below | above)
        # What a step of the scale does to each value: what is saved is one float and one byte.
        slope = torch.where(inside, steps - exact, steps)
        if low is not None:
            slope = torch.where(below, 0.0, torch.where(above, float(qmax - qmin), slope))
        ctx.save_for_backward(inside, slope, scale)
        ctx.axis, ctx.factor, ctx.has_low = axis, factor, low is not None
        return (steps * wide).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inside, slope, scale = ctx.saved_tensors
        grad = grads[0].to(torch.float32)
        of_scale = grad * slope
        if ctx.axis is None:
            of_scale = of_scale.sum().reshape(scale.shape)
        else:
            others = [axis for axis in range(grad.dim()) if axis != ctx.axis]
            of_scale = of_scale.sum(others) if others else of_scale
        of_low = (grad * ~inside).sum() * ctx.factor if ctx.has_low else None
        of_x = (grad * inside).to(grads[0].dtype)
        return of_x, of_scale * ctx.factor, of_low, None, None, None, None, None


def least_squares_scale(x: Tensor, scale: Tensor, grid: Grid, axis: int | None = None) -> Tensor:
    """The scale with the least squared error of a symmetric grid, near a given one.

    Args:
        x: Real values, float32.
        scale: Where to search: 0.1 to 1.2 of it, in steps of 0.01; per tensor or per channel.
        grid: The integers in use.
        axis: Channel axis of ``scale``.

    Returns:
        The shape of ``scale``.

    Example:
        >>> least_squares_scale(torch.tensor([-1.0, 0.0, 1.0, 1.4]), torch.tensor(1.4), Grid(-1, 1))
        tensor(1.1340)
    """
    x = x.detach().to(torch.float32)
    best, least = scale.clone(), torch.full_like(scale, torch.inf)
    others = [a for a in range(x.dim()) if a != axis]
    for ratio in torch.arange(0.1, 1.2, 0.01).tolist():
        candidate = (scale * ratio).clamp(min=MIN_SCALE)
        wide = along_axis(candidate, x.dim(), axis)
        error = (torch.clamp(torch.round(x / wide), grid.qmin, grid.qmax) * wide - x).square()
        total = error.sum() if axis is None else (error.sum(others) if others else error)
        better = total < least
        best, least = torch.where(better, candidate, best), torch.where(better, total, least)
    return best
