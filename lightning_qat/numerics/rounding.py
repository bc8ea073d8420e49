"""Rounding to a grid and its backward: compiled loops, torch operations, traced graphs."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_qat.numerics.bitmask import masked, pack_between, pack_bits
from lightning_qat.numerics.int_repr import IntRepr, attach_int_repr
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.min_max import Observe, batch_range
from lightning_qat.numerics.qparams import IntegerGrid

CACHED_GRIDS = 2**12
"""Size of the caches below. A frozen range is looked up in every forward."""


def round_to_steps(
    x: Tensor, scale: Tensor, step_min: Any, step_max: Any, out: Tensor | None = None
) -> Tensor:
    """Values rounded to the steps ``step_min`` to ``step_max`` from real zero, without a gradient.

    Args:
        x: Real values.
        scale: Size of a step; broadcasts against them.
        step_min: Lowest step, a number or a tensor.
        step_max: Highest step, alike.
        out: Where to write, of the shape, strides and type of ``x``; float32 only.
    """
    wide = x.to(torch.float32)
    if isinstance(step_min, float):
        found = kernels.fake_quantize(wide, scale, step_min, step_max, out=out)
        if found is not None:
            return found.values.to(x.dtype)
    return _by_steps(wide, scale, step_min, step_max, out).to(x.dtype)


def _by_steps(
    x: Tensor, scale: Tensor, step_min: Any, step_max: Any, out: Tensor | None = None
) -> Tensor:
    """``round_to_steps`` of float32 by operations of torch."""
    return torch.div(x, scale, out=out).round_().clamp_(step_min, step_max).mul_(scale)


class FakeQuantizeCall(NamedTuple):
    """The arguments of one fake quantization.

    Args:
        x: Real values.
        scale: Real size of one integer step, float32.
        zero_point: A number where looking at it costs nothing, else a tensor.
        grid: The integers in use.
        step_min: Lowest integer that can result, minus the zero point; a number where the zero
            point is one.
        step_max: Highest one, alike.
        edges: The real values between which, both excluded, the gradient passes, if known.
        ends: The real values that the input is clamped to first.
        keeps_bits: A bit per element tells backward where the gradient passes.
        saves_input: See ``fake_quantize``.
        carries_int_repr: See ``fake_quantize``.
    """

    x: Tensor
    scale: Tensor
    zero_point: Any
    grid: IntegerGrid
    step_min: Any
    step_max: Any
    edges: tuple[float, float] | None
    ends: tuple[float, float] | None
    keeps_bits: bool
    saves_input: bool
    carries_int_repr: bool


class _Rounded(NamedTuple):
    """A rounded tensor.

    Args:
        values: Real values.
        int_repr: Its integers.
        bits: The elements whose gradient passes, packed; see ``pack_bits``. Or those whose gradient
            does not pass, as bool.
    """

    values: Tensor
    int_repr: IntRepr | None
    bits: Tensor | None


def run_call(call: FakeQuantizeCall, observe: Observe | None) -> Tensor:
    """Round in the fastest way: a compiled loop, else what needs no bits, else torch operations."""
    found, x = _by_loop(call, observe), call.x
    result: Tensor
    if found is None:
        if observe is not None:
            observe(batch_range(x, ends=call.ends))
        rereads = call.keeps_bits and call.saves_input and not call.carries_int_repr
        if rereads and call.edges is not None and x.dtype == torch.float32:
            result = _MaskFromInput.apply(x, call.scale, call.step_min, call.step_max, call.edges)  # type: ignore[no-untyped-call]
            return result
        found = _by_operations(call)
    result = found.values.to(x.dtype)
    if x.requires_grad and torch.is_grad_enabled():
        values, bits = result, found.bits
        result = StraightThrough.apply(x, lambda: (values, bits))  # type: ignore[no-untyped-call]
    if found.int_repr is not None:
        attach_int_repr(result, found.int_repr)
    return result


def _by_loop(call: FakeQuantizeCall, observe: Observe | None) -> _Rounded | None:
    zero_point, grid = call.zero_point, call.grid
    if not isinstance(zero_point, float) or (call.keeps_bits and call.edges is None):
        return None
    counted = _counted_from_zero(zero_point, grid) if call.carries_int_repr else None
    offset = zero_point if counted is None else 0.0
    x = call.x if call.x.dtype == torch.float32 else call.x.detach().to(torch.float32)
    found = kernels.fake_quantize(
        *(x, call.scale, call.step_min, call.step_max),
        dtype=(counted or grid.dtype) if call.carries_int_repr else None,
        zero_point=offset,
        edges=call.edges if call.keeps_bits else None,
        ends=None if observe is None else call.ends or kernels.ALL,
    )
    if found is None:
        return None
    if observe is not None and found.range is not None:
        observe(found.range)
    int_repr = None if found.int_repr is None else IntRepr(found.int_repr, call.scale, offset)
    return _Rounded(found.values, int_repr, found.bits)


@torch.no_grad()
def _by_operations(call: FakeQuantizeCall) -> _Rounded:
    x = call.x.to(torch.float32)
    if not (call.keeps_bits or call.carries_int_repr):
        return _Rounded(_by_steps(x, call.scale, call.step_min, call.step_max), None, None)
    if isinstance(call.zero_point, Tensor) and not call.carries_int_repr:
        return _in_few_operations(x, call)
    reached = None if call.ends is None else (call.step_min, call.step_max)
    rounded = TorchRounding(x, call.scale, call.zero_point, call.grid, reached)
    bits = None
    if call.keeps_bits and call.ends is not None and call.edges is not None:
        bits = pack_between(x, *call.edges)
    elif call.keeps_bits:
        bits = rounded.bits()
    return _Rounded(rounded.values(), rounded.int_repr if call.carries_int_repr else None, bits)


def _in_few_operations(x: Tensor, call: FakeQuantizeCall) -> _Rounded:
    """For devices where every operation is a launch: a byte per element instead of a bit."""
    steps = torch.div(x, call.scale).round_()
    reached = steps.clamp(call.step_min, call.step_max)
    stopped = steps.ne(reached)
    values = torch.empty_like(reached, dtype=call.x.dtype)
    return _Rounded(torch.mul(reached, call.scale, out=values), None, stopped)


class TorchRounding:
    """Integers on a grid by operations of torch.

    Args:
        x: Real values, float32.
        scale: See ``fake_quantize``.
        zero_point: The zero point, a number or a tensor.
        grid: The integers in use.
        reached: Those steps from real zero that a clamp before lets through; ``bits`` does not know
            of it.
    """

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Any,
        grid: IntegerGrid,
        reached: tuple[float, float] | None,
    ) -> None:
        steps = torch.div(x, scale).round_()
        int_min, int_max = grid.qmin, grid.qmax
        if reached is not None:
            int_min, int_max = int(reached[0] + zero_point), int(reached[1] + zero_point)
        counted = _counted_from_zero(zero_point, grid)
        self._shift: Any = None if counted is not None else zero_point
        if counted is None:
            counted = grid.dtype
            steps.add_(zero_point)
        else:
            int_min, int_max = int_min - int(zero_point), int_max - int(zero_point)
        # One step wider than the grid tells what lies outside. Bytes are compared many times
        # faster than floats; one that wraps around still differs from its neighbour.
        wider = 0 if reached else 1
        wide = steps.clamp_(int_min - wider, int_max + wider).to(
            torch.int16 if grid.dtype is torch.int8 else torch.int32
        )
        self._steps, self._limits = steps, (int_min, int_max)
        if wider:
            self._wide = wide.to(grid.dtype)
            wide.clamp_(int_min, int_max)
        self._integers = wide.to(grid.dtype)
        self.int_repr = IntRepr(
            self._integers.view(counted), scale, 0.0 if self._shift is None else zero_point
        )

    def bits(self) -> Tensor:
        """The elements whose gradient passes, packed; see ``pack_bits``."""
        return pack_bits(self._wide.eq(self._integers))

    def values(self) -> Tensor:
        """The real values, float32. Call this once: it works in place.

        They are not computed from the integers, because NaN must stay NaN.
        """
        steps = self._steps.clamp_(*self._limits)
        if self._shift is not None:
            steps.sub_(self._shift)
        return steps.mul_(self.int_repr.scale)


def _counted_from_zero(zero_point: Any, grid: IntegerGrid) -> torch.dtype | None:
    """The type of steps from real zero that takes no more bits than the grid's; if there is one.

    Integers are those of the grid, or such steps where there is a type for them, which saves the
    addition: for a symmetric range, and for one that begins or ends at zero.
    """
    if not isinstance(zero_point, float):
        return None
    step_min, step_max = grid.qmin - int(zero_point), grid.qmax - int(zero_point)
    if grid.dtype is torch.int8 and 0 <= step_min and step_max <= 255:
        return torch.uint8
    limits = torch.iinfo(grid.dtype)
    return grid.dtype if limits.min <= step_min and step_max <= limits.max else None


def as_number(value: Tensor | float) -> Any:
    """A scalar tensor as a number, where that costs nothing; else the tensor.

    ATen's clamp with tensors is several times slower on CPUs than with numbers. Elsewhere a number
    would wait for the device.
    """
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.is_cpu and value.numel() == 1 else value


class TracedFakeQuantize(torch.autograd.Function):
    """Fake quantization in plain tensor operations, for a compiler to fuse."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        gradient_everywhere: bool,
    ) -> Tensor:
        """Round, and save where the gradient passes."""
        step_min, step_max = qmin - zero_point, qmax - zero_point
        steps = torch.round(x.to(torch.float32) / scale)
        reached = steps.clamp(step_min, step_max)
        # Not a comparison: on CPUs torch 2.13's compiler stores truth values one by one, which
        # takes eight times as long as everything else here.
        beyond = (steps - reached).abs().clamp(max=1.0)
        ctx.save_for_backward(None if gradient_everywhere else (1.0 - beyond).to(torch.uint8))
        return (reached * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient where the forward did not clip."""
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else grads[0] * inside
        return grad, None, None, None, None, None


class _MaskFromInput(torch.autograd.Function):
    """Backward looks at the input again: one vectorised pass, which ATen has for hardtanh."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        step_min: float,
        step_max: float,
        edges: tuple[float, float],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.edges = edges
        return _by_steps(x, scale, step_min, step_max)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges), None, None, None, None


@lru_cache(maxsize=CACHED_GRIDS)
def gradient_edges(step_min: float, step_max: float, scale: float) -> tuple[float, float]:
    """The real values between which, both excluded, rounding stays on the grid.

    Args:
        step_min: Lowest integer minus the zero point.
        step_max: Highest integer minus the zero point.
        scale: Real size of one step.
    """
    below, above = (step_min - 0.5) * scale, (step_max + 0.5) * scale
    # Ties go to the even step: they are inside where the last step is even.
    if step_min % 2 == 0:
        below = float(np.nextafter(np.float32(below), np.float32(-np.inf)))
    if step_max % 2 == 0:
        above = float(np.nextafter(np.float32(above), np.float32(np.inf)))
    return below, above


class StraightThrough(torch.autograd.Function):
    """The result of a function with a straight-through gradient.

    It is zero where a bit is not set, or where a bool is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
        """Round, and save where the gradient passes."""
        values, bits = compute()
        ctx.save_for_backward(bits)
        ctx.layout = values.shape, values.stride()
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Pass the gradient where the forward did not clip."""
        (bits,) = ctx.saved_tensors
        if bits is None:
            return grads[0], None
        if bits.dtype is torch.bool:
            return grads[0].masked_fill(bits, 0.0), None
        return masked(grads[0], bits, *ctx.layout), None
