"""Fake quantization with a learned scale and lower end: LSQ, LSQ+ and AMCT's ULQ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.numerics.arithmetic import MIN_SCALE, along_axis, zero_point_of
from lightning_qat.numerics.int_repr import IntRepr, attach_int_repr
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.kernels.loops import GradientMask
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.numerics.rounding import as_number, gradient_edges, round_to_steps
from lightning_qat.numerics.transforms import is_transforming, transformed_learned_fake_quantize


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor | None,
    grid: IntegerGrid,
    *,
    axis: int | None = None,
    normalized: bool = True,
    saves_input: bool = False,
    carries_int_repr: bool = False,
    known: Tensor | IntRepr | None = None,
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
        saves_input: See ``fake_quantize``. The gradient of the scale depends on what rounding took
            away, so backward keeps ``x`` itself with it and a copy without it.
        carries_int_repr: See ``fake_quantize``.
        known: The result's values or integers, where they are known.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.

    Example:
        >>> x = torch.tensor([0.3, 5.0])
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> y = learned_fake_quantize(x, scale, None, IntegerGrid(-8, 7), normalized=False)
        >>> y.sum().backward()
        >>> y.detach(), scale.grad  # (1 - 0.6) + 7
        (tensor([0.5000, 3.5000]), tensor(7.4000))
    """
    quantize = learned_fake_quantizer(
        scale,
        low,
        grid,
        x.numel() if normalized else None,
        axis,
        saves_input=saves_input,
        carries_int_repr=carries_int_repr,
        known=known,
    )
    return quantize(x)


def learned_fake_quantizer(
    scale: Tensor,
    low: Tensor | None,
    grid: IntegerGrid,
    values: int | None,
    axis: int | None = None,
    *,
    saves_input: bool = False,
    carries_int_repr: bool = False,
    known: Tensor | IntRepr | None = None,
    clamped: tuple[float, float] | None = None,
) -> Callable[[Tensor], Tensor]:
    """``learned_fake_quantize`` for many tensors on one grid, such as the steps of a sequence.

    Args:
        scale: Scalar, or one per channel of ``axis``, float32, positive.
        low: Lower end of the range, scalar float32, not positive, or ``None``.
        grid: The integers in use.
        values: The number of values in all tensors together, by which gradients are normalized.
            ``None``: they are not normalized.
        axis: Channel axis of ``scale``.
        saves_input: See ``fake_quantize``.
        carries_int_repr: See ``fake_quantize``.
        known: The values or integers of the result, if they are known; for a single tensor.
        clamped: Clamp each tensor to these ends first, as relu does, in the same pass; the lower
            one is 0, the upper one is at least a step and may be infinity. For one scale and
            float32 tensors on a CPU.
    """
    factor = 1.0
    if values is not None:
        factor = gradient_factor(values // scale.numel(), grid, has_low=low is not None)
    plainly = is_compiling() or is_transforming()
    # Without a lower end it is 0 on every device.
    zero_point: Any = 0.0
    if low is not None:
        with torch.no_grad():
            zero_point = zero_point_of(low, scale, grid)
        zero_point = zero_point if plainly else as_number(zero_point)
    step = None
    if scale.numel() == 1 and scale.device.type == "cpu" and not plainly:
        step = float(scale.detach())

    def call(x: Tensor) -> Tensor:
        if is_transforming():
            shaped = along_axis(scale, x.dim(), axis)
            return transformed_learned_fake_quantize(x, shaped, low, grid, zero_point, factor)
        wide = along_axis(scale.detach(), x.dim(), axis)
        fake = _LearnedGrid(wide, zero_point, grid, axis, step)
        if clamped is not None:
            fake.clamp(clamped[1])
        fake.keeps_int_repr, fake.known = carries_int_repr and not is_compiling(), known
        result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, low, fake, factor, saves_input
        )
        if isinstance(known, IntRepr):
            attach_int_repr(result, known)
        elif fake.keeps_int_repr:
            attach_int_repr(result, fake.take_int_repr())
        return result

    return call


def gradient_factor(values: int, grid: IntegerGrid, *, has_low: bool) -> float:
    """What the gradients of a scale are multiplied by; see ``learned_fake_quantize``.

    Args:
        values: How many share the scale.
        grid: The integers in use.
        has_low: There is a lower end.

    Example:
        >>> gradient_factor(100, IntegerGrid(-8, 4), has_low=False)
        0.05
    """
    highest = grid.qmax - grid.qmin if has_low else grid.qmax
    factor: float = (max(values, 1) * highest) ** -0.5
    return factor


def step_of_half_width(half_width: Tensor, grid: IntegerGrid) -> Tensor:
    """The step of a grid from a parameter that is half as wide as the grid.

    ``scale = max(|half_width| / half_count, MIN_SCALE)``. The gradient of the scale is passed on as
    it is, not divided by ``half_count``: LSQ has made it as large as those of weights. Plain
    gradient descent moves the scale by ``1 / half_count`` of what it would move a scale, and an
    optimizer whose steps are as long as its learning rate (Adam) moves a range by that, where it
    would move a scale by more than a whole step of 8 bits.

    Args:
        half_width: Parameter of any shape, float32.
        grid: The integers in use.

    Returns:
        The scale, positive, in the same shape.

    Example:
        >>> width = torch.tensor(64.0, requires_grad=True)
        >>> scale = step_of_half_width(width, IntegerGrid.activation(8))
        >>> scale.backward()
        >>> scale.item(), width.grad.item()
        (0.5, 1.0)
    """
    if is_compiling() or is_transforming():
        scale = (half_width.abs() / grid.half_count).clamp(min=MIN_SCALE)
        # Adds zero, and the rest of the gradient.
        rest = torch.where(scale > MIN_SCALE, half_width.sign(), 0.0)
        rest = rest * (1 - 1 / grid.half_count)
        return scale + (half_width - half_width.detach()) * rest.detach()
    result: Tensor = _StepOfHalfWidth.apply(half_width, grid.half_count)  # type: ignore[no-untyped-call]
    return result


def half_width_of_step(scale: Tensor, grid: IntegerGrid) -> Tensor:
    """The parameter whose ``step_of_half_width`` is a scale, to the bit.

    Of a scale whose half width is beyond float32 it is the largest float32.

    Example:
        >>> half_width_of_step(torch.tensor(0.5), IntegerGrid.weight(8))
        tensor(64.)
    """
    return (scale * grid.half_count).clamp(max=torch.finfo(torch.float32).max)


class _StepOfHalfWidth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, half_width: Tensor, half_count: int) -> Tensor:
        scale = (half_width.abs() / half_count).clamp_(min=MIN_SCALE)
        ctx.save_for_backward(half_width)
        ctx.half_count = half_count
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (half_width,) = ctx.saved_tensors
        too_small = half_width.abs() < MIN_SCALE * ctx.half_count
        return grads[0] * half_width.sign().masked_fill_(too_small, 0.0), None


class _LearnedGrid:
    """One scale, zero point and grid during one call: rounds values, and computes gradients.

    Args:
        scale: float32, in a shape that broadcasts against the values.
        zero_point: A number where looking at it costs nothing, else a tensor.
        grid: The integers in use.
        axis: Channel axis of the scale; ``None``: one scale for all values.
        step: The scale as a number where looking at it costs nothing, else ``None``.
    """

    def __init__(
        self,
        scale: Tensor,
        zero_point: Any,
        grid: IntegerGrid,
        axis: int | None,
        step: float | None,
    ) -> None:
        self.scale, self.zero_point, self.grid, self.axis = scale, zero_point, grid, axis
        self.step = step
        self.step_min, self.step_max = grid.qmin - zero_point, grid.qmax - zero_point
        self.keeps_int_repr = False
        self.known: Tensor | IntRepr | None = None
        self._integers: Tensor | None = None
        self._reached_min, self._reached_max = self.step_min, self.step_max
        self._clamped_at: float | None = None
        self.saturates = True
        """Whether values reach beyond the grid; a clamp may end before it."""
        self._share = 1.0
        """How much of a value beyond the edges the scale moves."""

    def clamp(self, high: float) -> None:
        """Let values be clamped to 0 and ``high`` before they are rounded."""
        assert self.step is not None
        above = gradient_edges(self.step_min, self.step_max, self.step)[1]
        self._clamped_at = min(above, high)
        self._reached_min = 0.0
        if high < above:
            self.saturates = False
            self._reached_max = min(
                float(np.rint(np.float32(high) / np.float32(self.step))), self.step_max
            )
            # All of them are ``high``, and that is what rounding took from.
            point = self._reached_max * self.step
            self._share = (point - high) / point

    def rounded_steps(self, x: Tensor) -> Tensor:
        """The integer that each value is rounded to, minus the zero point; float32."""
        steps = torch.div(x.to(torch.float32), self.scale).round_()
        return steps.clamp_(self._reached_min, self._reached_max)

    def values(self, x: Tensor) -> Tensor:
        """Real values on the grid; their integers are kept aside where they are wanted."""
        known, self.known = self.known, None
        if known is not None:
            return known.restore(x.dtype) if isinstance(known, IntRepr) else known.detach()
        if not self.keeps_int_repr:
            return round_to_steps(x, self.scale, self._reached_min, self._reached_max)
        if isinstance(self.step_min, float):
            found = kernels.fake_quantize(
                *(x.to(torch.float32), self.scale, self._reached_min, self._reached_max),
                dtype=self.grid.dtype,
                zero_point=self.zero_point,
            )
            if found is not None:
                self._integers = found.int_repr
                return found.values.to(x.dtype)
        steps = self.rounded_steps(x)
        self._integers = (steps + self.zero_point).to(self.grid.dtype)
        return steps.mul_(self.scale).to(x.dtype)

    def take_int_repr(self) -> IntRepr:
        """Return the integers that ``values`` has kept, and drop them."""
        assert self._integers is not None
        integers, self._integers = self._integers, None
        return IntRepr(integers, self.scale, self.zero_point)

    def gradients(self, grad: Tensor, x: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of values and of their scale, and the sum of what comes from outside the range.

        The last two times ``factor``, one per scale.
        """
        x = x.to(torch.float32)
        mask, edges = GradientMask.BY_STEPS, (0.0, 0.0)
        if self._clamped_at is not None:
            mask, edges = GradientMask.CLAMPED, (0.0, self._clamped_at)
        elif self.step is not None and isinstance(self.step_min, float):
            mask, edges = (
                GradientMask.BY_EDGES,
                gradient_edges(self.step_min, self.step_max, self.step),
            )
        if isinstance(self.step_min, float) and not torch.is_grad_enabled():
            found = kernels.learned_backward(
                *(grad, x, self.scale, self._reached_min, self._reached_max),
                *(mask, edges, self._share, factor),
            )
            if found is not None:
                return found
        if mask is GradientMask.BY_STEPS:
            steps = torch.round(x / self.scale)
            # Not a comparison; see ``TracedFakeQuantize`` in ``rounding``.
            beyond = (steps - steps.clamp(self.step_min, self.step_max)).abs().clamp(max=1.0)
            of_x = grad * (1.0 - beyond)
        else:
            of_x = torch.ops.aten.hardtanh_backward(grad, x, *edges)
        stopped, points = grad - of_x, self.rounded_steps(x) * self.scale
        # Inside, a step of the scale moves a value by round(v) - v, for v = x / scale; beyond, by
        # the steps from what stays: from real zero, or from the lower end.
        moved = self._total(of_x, points - x) + self._total(stopped, points) * self._share
        if mask is GradientMask.CLAMPED:
            stopped = torch.ops.aten.hardtanh_backward(stopped, x, 0.0, math.inf)
        return of_x, moved / self.scale.flatten() * factor, self._total(stopped) * factor

    def _total(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """The sum over what shares a scale; of products, where weights are given."""
        if self.axis is None and weights is not None:
            # New memory for the products would cost more than they do.
            return torch.dot(values.flatten(), weights.flatten())
        if weights is not None:
            values = values * weights
        if self.axis is None:
            return values.sum()
        others = [axis for axis in range(values.dim()) if axis != self.axis]
        return values.sum(others) if others else values


class _LearnedFakeQuantize(torch.autograd.Function):
    """Fake quantization with gradients for the scale and the lower end; keeps the input."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        low: Tensor | None,
        fake: _LearnedGrid,
        factor: float,
        saves_input: bool,
    ) -> Tensor:
        result = fake.values(x)
        ctx.save_for_backward(x if saves_input else x.clone())
        ctx.fake, ctx.factor, ctx.shape = fake, factor, scale.shape
        # A lower end that is no parameter is real zero, where the grid then starts.
        ctx.has_low = low is not None and low.requires_grad
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,), fake, grad = ctx.saved_tensors, ctx.fake, grads[0]
        of_x, of_scale, outside = fake.gradients(grad.to(torch.float32), x, ctx.factor)
        of_low = None
        if ctx.has_low:
            outside = outside * float(fake.saturates)
            of_scale, of_low = of_scale - fake.step_min * outside, outside.reshape(())
        return of_x.to(grad.dtype), of_scale.reshape(ctx.shape), of_low, None, None, None
