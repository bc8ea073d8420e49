"""Fake quantization, the hot path: what is rounded, where gradients pass, what backward keeps.

One function chooses among the ways to do it, which give the same numbers:

* on CPUs with a compiler: a loop that goes over the tensor once, ``kernels``; backward keeps a bit
  per element;
* on CPUs without, where a reader of the result keeps its input anyway (layers): backward looks at
  the input again, one vectorised pass (``hardtanh_backward``);
* otherwise operations of torch in place over one temporary; backward keeps a bit per element;
* while ``torch.compile`` or ``torch.export`` traces: plain tensor operations, for it to fuse.

ATen's own fake-quantize kernels are not vectorised on CPUs (``benchmarks/step.py --kernels`` prints
the times of all).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat import kernels
from lightning_qat.bits import masked, pack_between, pack_bits
from lightning_qat.codes import Codes, carry_codes
from lightning_qat.qparams import Grid
from lightning_qat.ranges import batch_range

_KNOWN = 2**12
"""Numbers of so many grids are kept: those of frozen ranges are asked for in every forward."""

Observe = Callable[[Tensor], None]
"""Takes note of ``(-min, max)``; see ``batch_range``."""


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    gradient_everywhere: bool = False,
    saves_input: bool = False,
    carries_codes: bool = False,
    observe: Observe | None = None,
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
        saves_input: Backward may look at ``x`` again instead of keeping a bit per element, where
            that is faster; for readers that keep ``x`` anyway. ``x`` must not be changed in place
            before backward.
        carries_codes: The result shall carry its integers, so that what reads it within
            ``keeping_codes`` keeps those; overrides ``saves_input``.
        observe: Is given the range of ``x`` (``batch_range``), found in the same pass where that is
            possible.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.

    Example:
        >>> x = torch.tensor([-9.0, 0.2, 0.625], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), Grid(-8, 7))
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-2.0000,  0.2500,  0.5000]), tensor([0., 1., 1.]))
    """
    if is_compiling():
        if observe is not None:
            observe(batch_range(x))
        result: Tensor = _Traced.apply(  # type: ignore[no-untyped-call]
            x, scale, zero_point, grid.qmin, grid.qmax, gradient_everywhere
        )
        return result
    origin = number_of(zero_point)
    low, high = grid.qmin - origin, grid.qmax - origin
    keeps_bits = x.requires_grad and torch.is_grad_enabled() and not gradient_everywhere
    edges = None
    if keeps_bits and isinstance(origin, float) and scale.numel() == 1:
        edges = edges_of(low, high, scale.item())
    call = _Call(
        x,
        scale,
        origin,
        grid,
        low,
        high,
        edges,
        ends=None,
        keeps_bits=keeps_bits,
        saves_input=saves_input,
        carries_codes=carries_codes,
    )
    return _quantize(call, observe)


def clamp_and_quantize(
    x: Tensor,
    ends: tuple[float, float],
    scale: Tensor,
    zero_point: Tensor,
    grid: Grid,
    *,
    carries_codes: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """``fake_quantize`` of relu, relu6 or hardtanh of ``x``, in one pass with one gradient.

    To round never changes the order of two values, so the grid is clamped instead of the tensor.

    Args:
        x: Real values, float32, on a device where looking at a number costs nothing; see
            ``clamps``. It must not be changed in place before backward.
        ends: Of the clamp, the upper one infinity for relu. The gradient passes strictly between.
        scale: As there, a scalar.
        zero_point: As there, a scalar.
        grid: As there.
        carries_codes: As there.
        observe: Is given the range of the clamped values.

    Example:
        >>> x = torch.tensor([-1.0, 0.1, 3.0, 7.0], requires_grad=True)
        >>> y = clamp_and_quantize(
        ...     x, (0.0, 6.0), torch.tensor(0.5), torch.tensor(0.0), Grid(-128, 127)
        ... )
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 0., 3., 6.]), tensor([0., 1., 1., 0.]))
    """
    origin = number_of(zero_point)
    low, high, edges = _clamped(grid.qmin - origin, grid.qmax - origin, scale.item(), ends)
    keeps_bits = x.requires_grad and torch.is_grad_enabled()
    call = _Call(
        x,
        scale,
        origin,
        grid,
        low,
        high,
        edges,
        ends,
        keeps_bits=keeps_bits,
        saves_input=True,
        carries_codes=carries_codes,
    )
    return _quantize(call, observe)


@lru_cache(maxsize=_KNOWN)
def _clamped(
    first: float, last: float, scale: float, ends: tuple[float, float]
) -> tuple[float, float, tuple[float, float]]:
    """The steps that are left of a grid, and where the gradient passes, behind a clamp."""
    below, above = edges_of(first, last, scale)
    steps = (np.rint(np.float32(end) / np.float32(scale)) for end in ends)
    low, high = (float(np.clip(step, first, last)) for step in steps)
    return low, high, (max(below, ends[0]), min(above, ends[1]))


def clamps(x: Tensor, zero_point: Tensor) -> bool:
    """Whether ``clamp_and_quantize`` can be given these."""
    single = zero_point.numel() == 1 and zero_point.device.type == "cpu"
    return single and x.dtype == torch.float32 and not is_compiling()


def fake_quantizer(scale: Tensor, zero_point: Tensor, grid: Grid) -> Callable[[Tensor], Tensor]:
    """``fake_quantize`` with ``saves_input`` for many small tensors on one grid.

    Its numbers are looked up once, and no call goes through Python in backward.
    """
    origin = zero_point if is_compiling() else number_of(zero_point)
    if isinstance(origin, Tensor):
        return lambda x: fake_quantize(x, scale, zero_point, grid, saves_input=True)
    low, high = grid.qmin - origin, grid.qmax - origin
    edges = edges_of(low, high, scale.item())

    def call(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return fake_quantize(x, scale, zero_point, grid, saves_input=True)
        # ATen's own node has the gradient, from x alone; its result is written over.
        result: Tensor = torch.nn.functional.hardtanh(x, *edges)
        on_grid(x.detach(), scale, low, high, out=result.detach())
        return result

    return call


def quantized_again(weight: Tensor, known: Tensor | Codes) -> Tensor:
    """A quantized weight that is known, with the gradient of ``gradient_everywhere``.

    Args:
        weight: The float weight, to which the gradient goes.
        known: Its quantized values, or their integers.
    """
    result: Tensor
    if isinstance(known, Codes):
        result = _Pass.apply(weight, lambda: (known.restore(), None))  # type: ignore[no-untyped-call]
        carry_codes(result, known)
        return result
    # Another tensor of the same memory: a graph of its own.
    result = _Pass.apply(weight, lambda: (known.detach(), None))  # type: ignore[no-untyped-call]
    return result


def on_grid(x: Tensor, scale: Tensor, low: Any, high: Any, out: Tensor | None = None) -> Tensor:
    """Values rounded to the steps ``low`` to ``high`` from real zero, without a gradient.

    Args:
        x: Real values.
        scale: Size of a step; broadcasts against them.
        low: Lowest step, a number or a tensor.
        high: Highest step, alike.
        out: Where to write, of the shape, strides and type of ``x``; float32 only.
    """
    wide = x.to(torch.float32)
    if isinstance(low, float):
        found = kernels.fake_quantize(wide, scale, low, high, out=out)
        if found is not None:
            return found.values.to(x.dtype)
    return _by_steps(wide, scale, low, high, out).to(x.dtype)


def _by_steps(x: Tensor, scale: Tensor, low: Any, high: Any, out: Tensor | None = None) -> Tensor:
    """``on_grid`` of float32 by operations of torch."""
    return torch.div(x, scale, out=out).round_().clamp_(low, high).mul_(scale)


class _Call(NamedTuple):
    """One tensor on its way to the grid, and what is wanted of it.

    Args:
        x: Real values.
        scale: As for ``fake_quantize``.
        origin: The zero point; a number where looking at it costs nothing.
        grid: The integers in use.
        low: Lowest step from real zero that is reached; a number where the origin is one.
        high: Highest step.
        edges: Between which values, both excluded, the gradient passes; where that is known.
        ends: What the values are clamped to before.
        keeps_bits: A bit per element tells backward where the gradient passes.
        saves_input: As for ``fake_quantize``.
        carries_codes: As for ``fake_quantize``.
    """

    x: Tensor
    scale: Tensor
    origin: Any
    grid: Grid
    low: Any
    high: Any
    edges: tuple[float, float] | None
    ends: tuple[float, float] | None
    keeps_bits: bool
    saves_input: bool
    carries_codes: bool


class _OnGrid(NamedTuple):
    """A tensor on a grid.

    Args:
        values: Real values.
        codes: Its integers.
        bits: Where the gradient passes.
    """

    values: Tensor
    codes: Codes | None
    bits: Tensor | None


def _quantize(call: _Call, observe: Observe | None) -> Tensor:
    """The fastest way to the grid: a loop; else what needs no bits; else operations of torch."""
    found, x = _by_loop(call, observe), call.x
    result: Tensor
    if found is None:
        if observe is not None:
            observe(batch_range(x, ends=call.ends))
        rereads = call.keeps_bits and call.saves_input and not call.carries_codes
        if rereads and call.edges is not None and x.dtype == torch.float32:
            result = _Reread.apply(x, call.scale, call.low, call.high, call.edges)  # type: ignore[no-untyped-call]
            return result
        found = _by_operations(call)
    result = _Pass.apply(x, lambda: (found.values.to(x.dtype), found.bits))  # type: ignore[no-untyped-call]
    if found.codes is not None:
        carry_codes(result, found.codes)
    return result


def _by_loop(call: _Call, observe: Observe | None) -> _OnGrid | None:
    origin, grid = call.origin, call.grid
    if not isinstance(origin, float) or (call.keeps_bits and call.edges is None):
        return None
    counted = _counted_from_zero(origin, grid) if call.carries_codes else None
    zero = origin if counted is None else 0.0
    found = kernels.fake_quantize(
        *(call.x.detach().to(torch.float32), call.scale, call.low, call.high),
        dtype=(counted or grid.dtype) if call.carries_codes else None,
        zero=zero,
        edges=call.edges if call.keeps_bits else None,
        ends=None if observe is None else call.ends or kernels.ALL,
    )
    if found is None:
        return None
    if observe is not None and found.seen is not None:
        observe(found.seen)
    codes = None if found.codes is None else Codes(found.codes, call.scale, zero)
    return _OnGrid(found.values, codes, found.bits)


@torch.no_grad()
def _by_operations(call: _Call) -> _OnGrid:
    x = call.x.to(torch.float32)
    if not (call.keeps_bits or call.carries_codes):
        return _OnGrid(_by_steps(x, call.scale, call.low, call.high), None, None)
    reached = None if call.ends is None else (call.low, call.high)
    rounded = _Rounded(x, call.scale, call.origin, call.grid, reached)
    bits = None
    if call.keeps_bits and call.ends is not None and call.edges is not None:
        bits = pack_between(x, *call.edges)
    elif call.keeps_bits:
        bits = rounded.bits()
    return _OnGrid(rounded.values(), rounded.codes if call.carries_codes else None, bits)


class _Rounded:
    """Integers on a grid by operations of torch.

    Args:
        x: Real values, float32.
        scale: As for ``fake_quantize``.
        origin: The zero point, a number or a tensor.
        grid: The integers in use.
        reached: Those steps from real zero that a clamp before lets through; ``bits`` does not know
            of it.
    """

    def __init__(
        self,
        x: Tensor,
        scale: Tensor,
        origin: Any,
        grid: Grid,
        reached: tuple[float, float] | None,
    ) -> None:
        steps = torch.div(x, scale).round_()
        low, high = grid.qmin, grid.qmax
        if reached is not None:
            low, high = int(reached[0] + origin), int(reached[1] + origin)
        counted = _counted_from_zero(origin, grid)
        self._shift: Any = None if counted is not None else origin
        if counted is None:
            counted = grid.dtype
            steps.add_(origin)
        else:
            low, high = low - int(origin), high - int(origin)
        # One step wider than the grid tells what lies outside. Bytes are compared many times
        # faster than floats; one that wraps around still differs from its neighbour.
        wider = 0 if reached else 1
        wide = steps.clamp_(low - wider, high + wider).to(
            torch.int16 if grid.dtype is torch.int8 else torch.int32
        )
        self._steps, self._ends = steps, (low, high)
        if wider:
            self._wide = wide.to(grid.dtype)
            wide.clamp_(low, high)
        self._integers = wide.to(grid.dtype)
        self.codes = Codes(
            self._integers.view(counted), scale, 0.0 if self._shift is None else origin
        )

    def bits(self) -> Tensor:
        """Where the gradient passes, packed."""
        return pack_bits(self._wide.eq(self._integers))

    def values(self) -> Tensor:
        """To be called once. Not from the integers: NaN must come out as NaN."""
        steps = self._steps.clamp_(*self._ends)
        if self._shift is not None:
            steps.sub_(self._shift)
        return steps.mul_(self.codes.scale)


def _counted_from_zero(origin: Any, grid: Grid) -> torch.dtype | None:
    """The type of steps from real zero that takes no more bits than the grid's; if there is one.

    Integers are those of the grid, or such steps where there is a type for them, which saves the
    addition: for a symmetric range, and for one that begins or ends at zero.
    """
    if not isinstance(origin, float):
        return None
    low, high = grid.qmin - int(origin), grid.qmax - int(origin)
    if grid.dtype is torch.int8 and 0 <= low and high <= 255:
        return torch.uint8
    limits = torch.iinfo(grid.dtype)
    return grid.dtype if limits.min <= low and high <= limits.max else None


def number_of(value: Tensor) -> Any:
    """A scalar tensor as a number, where that costs nothing; else the tensor.

    ATen's clamp with tensors is several times slower on CPUs than with numbers. Elsewhere a number
    would wait for the device.
    """
    return value if value.numel() > 1 or value.device.type != "cpu" else value.item()


class _Traced(torch.autograd.Function):
    """Plain tensor operations, for a compiler to fuse."""

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
        low, high = qmin - zero_point, qmax - zero_point
        steps = torch.round(x.to(torch.float32) / scale)
        reached = steps.clamp(low, high)
        # Not a comparison: on CPUs torch 2.13's compiler stores truth values one by one, which
        # takes eight times as long as everything else here.
        beyond = (steps - reached).abs().clamp(max=1.0)
        ctx.save_for_backward(None if gradient_everywhere else (1.0 - beyond).to(torch.uint8))
        return (reached * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (inside,) = ctx.saved_tensors
        grad = grads[0] if inside is None else grads[0] * inside
        return grad, None, None, None, None, None


class _Reread(torch.autograd.Function):
    """Backward looks at the input again: one vectorised pass, which ATen has for hardtanh."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: float, high: float, edges: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.edges = edges
        return _by_steps(x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges), None, None, None, None


@lru_cache(maxsize=_KNOWN)
def edges_of(low: float, high: float, scale: float) -> tuple[float, float]:
    """Between which real values, both excluded, rounding leads to the steps ``low`` to ``high``."""
    below, above = (low - 0.5) * scale, (high + 0.5) * scale
    # Ties go to the even step: they are inside where the last step is even.
    if low % 2 == 0:
        below = float(np.nextafter(np.float32(below), np.float32(-np.inf)))
    if high % 2 == 0:
        above = float(np.nextafter(np.float32(above), np.float32(np.inf)))
    return below, above


class _Pass(torch.autograd.Function):
    """What a function computes, through which the gradient passes where its bits are set."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, compute: Callable[[], tuple[Tensor, Tensor | None]]) -> Tensor:
        values, bits = compute()
        ctx.save_for_backward(bits)
        ctx.layout = values.shape, values.stride()
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (bits,) = ctx.saved_tensors
        return grads[0] if bits is None else masked(grads[0], bits, *ctx.layout), None
