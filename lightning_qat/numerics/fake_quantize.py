"""Fake quantization, the hot path: rounding, its gradient, and what is kept for backward.

One function chooses among the ways to do it, which give the same numbers:

* on CPUs with a compiler: a loop that goes over the tensor once, ``kernels``; backward keeps a bit
  per element;
* on GPUs with Triton: a kernel that does the same in one launch, ``gpu``;
* on CPUs without, where a reader of the result keeps its input anyway (layers): backward looks at
  the input again, one vectorised pass (``hardtanh_backward``);
* otherwise operations of torch, in place over one temporary where backward keeps a bit per element,
  and as few as possible on other devices than CPUs, where backward keeps a byte;
* while ``torch.compile`` or ``torch.export`` traces: plain tensor operations, for it to fuse;
* in a transform of ``torch.func``: operations that it can differentiate and batch, ``transforms``.

ATen's own fake-quantize kernels are not vectorised on CPUs (``benchmarks/step.py --kernels`` prints
the times of all).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import suits
from lightning_qat.numerics.gpu.straight_through import quantize_on_device
from lightning_qat.numerics.int_repr import IntRepr, attach_int_repr
from lightning_qat.numerics.memory_layout import rows_of
from lightning_qat.numerics.min_max import Observe, batch_range
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.numerics.rounding import (
    CACHED_GRIDS,
    FakeQuantizeCall,
    StraightThrough,
    TracedFakeQuantize,
    as_number,
    gradient_edges,
    round_to_steps,
    run_call,
)
from lightning_qat.numerics.transforms import is_transforming, transformed_fake_quantize


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    *,
    gradient_everywhere: bool = False,
    saves_input: bool = False,
    carries_int_repr: bool = False,
    observe: Observe | None = None,
    limits: tuple[Any, Any] | None = None,
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
        carries_int_repr: The result carries its integers, so that an operation within
            ``saving_int_repr`` keeps those for backward; overrides ``saves_input``.
        observe: Is called with the range of ``x`` (``batch_range``), which is found in the same
            pass if possible.
        limits: ``grid.qmin - zero_point`` and ``grid.qmax - zero_point``, if they are known.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.

    Example:
        >>> x = torch.tensor([-9.0, 0.2, 0.625], requires_grad=True)
        >>> y = fake_quantize(x, torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-8, 7))
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([-2.0000,  0.2500,  0.5000]), tensor([0., 1., 1.]))
    """
    if is_transforming():
        if observe is not None:
            observe(batch_range(x))
        return transformed_fake_quantize(x, scale, zero_point, grid, gradient_everywhere)
    if is_compiling():
        if observe is not None:
            observe(batch_range(x))
        result: Tensor = TracedFakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, zero_point, grid.qmin, grid.qmax, gradient_everywhere
        )
        return result
    if suits(x) and (scale.numel() == 1 or gradient_everywhere) and rows_of(x, scale) is not None:
        return quantize_on_device(
            x,
            DeviceGrid(GridRule.GIVEN, scale, zero_point.to(torch.float32), grid),
            gradient_everywhere=gradient_everywhere,
            carries_int_repr=carries_int_repr,
            observe=observe,
        )
    zero_point_number = as_number(zero_point)
    if limits is None:
        step_min, step_max = grid.qmin - zero_point_number, grid.qmax - zero_point_number
    else:
        step_min, step_max = map(as_number, limits)
    keeps_bits = x.requires_grad and torch.is_grad_enabled() and not gradient_everywhere
    edges = None
    if keeps_bits and isinstance(zero_point_number, float) and scale.numel() == 1:
        edges = gradient_edges(step_min, step_max, scale.item())
    call = FakeQuantizeCall(
        x,
        scale,
        zero_point_number,
        grid,
        step_min,
        step_max,
        edges,
        ends=None,
        keeps_bits=keeps_bits,
        saves_input=saves_input,
        carries_int_repr=carries_int_repr,
    )
    return run_call(call, observe)


def clamp_and_quantize(
    x: Tensor,
    ends: tuple[float, float],
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    *,
    carries_int_repr: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """``fake_quantize`` of relu, relu6 or hardtanh of ``x``, in one pass with one gradient.

    To round never changes the order of two values, so the grid is clamped instead of the tensor.

    Args:
        x: Real values; see ``clamps``. It must not be changed in place before backward.
        ends: Lower and upper end of the clamp, real values; the upper one is infinity for relu. The
            gradient passes strictly between them.
        scale: Real size of one integer step, float32 scalar, positive.
        zero_point: Integer that stands for real zero, scalar.
        grid: The integers in use.
        carries_int_repr: The result carries its integers; see ``fake_quantize``.
        observe: Is called with the range of the clamped values.

    Returns:
        Real values on the grid, the shape of ``x``.

    Example:
        >>> x = torch.tensor([-1.0, 0.1, 3.0, 7.0], requires_grad=True)
        >>> y = clamp_and_quantize(
        ...     x, (0.0, 6.0), torch.tensor(0.5), torch.tensor(0.0), IntegerGrid(-128, 127)
        ... )
        >>> y.sum().backward()
        >>> y.detach(), x.grad
        (tensor([0., 0., 3., 6.]), tensor([0., 1., 1., 0.]))
    """
    if suits(x):
        given = DeviceGrid(GridRule.GIVEN, scale, zero_point.to(torch.float32), grid)
        return quantize_on_device(
            x, given, clamp=ends, carries_int_repr=carries_int_repr, observe=observe
        )
    zero_point_number = as_number(zero_point)
    step_min, step_max, edges = _clamped(
        grid.qmin - zero_point_number, grid.qmax - zero_point_number, scale.item(), ends
    )
    keeps_bits = x.requires_grad and torch.is_grad_enabled()
    call = FakeQuantizeCall(
        x,
        scale,
        zero_point_number,
        grid,
        step_min,
        step_max,
        edges,
        ends,
        keeps_bits=keeps_bits,
        saves_input=True,
        carries_int_repr=carries_int_repr,
    )
    return run_call(call, observe)


@lru_cache(maxsize=CACHED_GRIDS)
def _clamped(
    step_min: float, step_max: float, scale: float, ends: tuple[float, float]
) -> tuple[float, float, tuple[float, float]]:
    """The steps of a grid that a clamp leaves, and the edges between which the gradient passes."""
    below, above = gradient_edges(step_min, step_max, scale)
    steps = (np.rint(np.float32(end) / np.float32(scale)) for end in ends)
    lowest, highest = (float(np.clip(step, step_min, step_max)) for step in steps)
    return lowest, highest, (max(below, ends[0]), min(above, ends[1]))


def clamps(x: Tensor, zero_point: Tensor, ends: tuple[float, float]) -> bool:
    """Whether ``clamp_and_quantize`` can quantize such a tensor with such a zero point."""
    if is_compiling() or is_transforming() or zero_point.numel() > 1:
        return False
    if suits(x):
        return all(_is_exact(end, x.dtype) for end in ends)
    return zero_point.device.type == "cpu" and x.dtype == torch.float32


@lru_cache
def _is_exact(number: float, dtype: torch.dtype) -> bool:
    """Whether a dtype has a number; torch's own clamps round it to values and gradients apart."""
    if dtype == torch.float32:
        return True
    return float(torch.tensor(number, dtype=torch.float64).to(dtype)) == number


def fake_quantizer(
    scale: Tensor, zero_point: Tensor, grid: IntegerGrid
) -> Callable[[Tensor], Tensor]:
    """``fake_quantize`` with ``saves_input`` for many small tensors on one grid.

    Its numbers are looked up once, and no call goes through Python in backward.
    """
    plainly = is_compiling() or is_transforming()
    zero_point_number = zero_point if plainly else as_number(zero_point)
    if isinstance(zero_point_number, Tensor):
        return lambda x: fake_quantize(x, scale, zero_point, grid, saves_input=True)
    step_min, step_max = grid.qmin - zero_point_number, grid.qmax - zero_point_number
    edges = gradient_edges(step_min, step_max, scale.item())

    def call(x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return fake_quantize(x, scale, zero_point, grid, saves_input=True)
        # ATen's own node has the gradient, from x alone; its result is written over.
        result: Tensor = torch.nn.functional.hardtanh(x, *edges)
        round_to_steps(x.detach(), scale, step_min, step_max, out=result.detach())
        return result

    return call


def quantized_again(
    weight: Tensor, known: Tensor | IntRepr, int_repr: IntRepr | None = None
) -> Tensor:
    """A quantized weight that is known, with the gradient of ``gradient_everywhere``.

    Args:
        weight: The float weight, to which the gradient goes.
        known: Its quantized values, or their integers.
        int_repr: The integers, beside the values.
    """
    result: Tensor
    if isinstance(known, IntRepr):
        int_repr = known
        result = StraightThrough.apply(weight, lambda: (known.restore(weight.dtype), None))  # type: ignore[no-untyped-call]
    else:
        # Another tensor of the same memory: a graph of its own.
        result = StraightThrough.apply(weight, lambda: (known.detach(), None))  # type: ignore[no-untyped-call]
    if int_repr is not None:
        attach_int_repr(result, int_repr)
    return result
