"""Fused loops for CPUs: what torch does in several operations, in one pass over a tensor.

``loops.c`` beside this module is compiled when a quantizer first needs it, which takes half a
second, and kept in the user's cache directory (``library_cache``). It uses torch's threads.
Without a compiler, and for tensors that the loops do not know, every function returns ``None`` and
its caller takes torch's operations, whose numbers are the same.

``torch.compile`` makes loops that are as fast, but takes ten seconds for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.numerics.kernels.build import BLOCK, compiled_loops
from lightning_qat.numerics.memory_layout import (
    fills_its_memory,
    has_rows,
    room_for_bits,
    rows_of,
)
from lightning_qat.numerics.transforms import is_transforming

ALL = -math.inf, math.inf
"""A clamp range that changes nothing."""


class Quantized(NamedTuple):
    """The results of ``fake_quantize``.

    Args:
        values: Real values on the grid.
        int_repr: Its integers.
        bits: The elements whose gradient passes, packed.
        range: ``value_range`` of the input.
    """

    values: Tensor
    int_repr: Tensor | None
    bits: Tensor | None
    range: Tensor | None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    step_min: float,
    step_max: float,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    zero_point: float = 0.0,
    edges: tuple[float, float] | None = None,
    ends: tuple[float, float] | None = None,
) -> Quantized | None:
    """``clip(round(x / scale), step_min, step_max) * scale``, and what else is wanted, in one pass.

    Args:
        x: Real values.
        scale: Size of a step, float32; a scalar, or one per row of the first axis.
        step_min: Lowest integer in use minus the zero point.
        step_max: Highest integer in use minus the zero point.
        out: Where to write; like ``x`` in shape and strides.
        dtype: Integers are wanted, of this type: int8 or uint8.
        zero_point: Is added to the steps from real zero to give the integers.
        edges: Bits are wanted, set for values strictly between; with a scalar scale.
        ends: The range is wanted, of values clamped to these.

    Example:
        >>> found = fake_quantize(torch.tensor([-9.0, 0.2, 0.625]), torch.tensor(0.25), -8, 7)
        >>> found is None or found.values.tolist() == [-2.0, 0.25, 0.5]
        True
    """
    rows = _rows(x, scale)
    if not rows or dtype not in (torch.int8, torch.uint8, None) or (edges and rows > 1):
        return None
    found = Quantized(
        torch.empty_like(x) if out is None else out,
        None if dtype is None else torch.empty_like(x, dtype=dtype),
        None if edges is None else room_for_bits(x),
        None if ends is None else torch.empty(2, dtype=torch.float32),
    )
    _call(
        *(
            "fake_quantize",
            x,
            rows,
            x,
            found.values,
            scale,
            step_min,
            step_max,
            found.int_repr,
            zero_point,
        ),
        *(found.bits, *(edges or ALL), found.range, *(ends or ALL)),
    )
    return found


def value_range(x: Tensor, ends: tuple[float, float] = ALL) -> Tensor | None:
    """``(-min, max)`` of values clamped to ``ends``, float32; infinity where one is NaN."""
    if not _suits(x):
        return None
    found = torch.empty(2, dtype=torch.float32)
    _call("value_range", x, 1, x, found, *ends)
    return found


def row_ranges(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Minimum and maximum of each row of the first axis, NaN where it holds one."""
    if not (_suits(x) and x.dim() and has_rows(x)):
        return None
    rows = x.shape[0]
    low, high = x.new_empty(rows), x.new_empty(rows)
    _call("row_ranges", x, rows, x, low, high)
    return low, high


class GradientMask(IntEnum):
    """Which values of a learned grid get no gradient; as in ``loops.c``."""

    BY_EDGES = 0
    """Those that are not strictly between two edges."""
    BY_STEPS = 1
    """Those whose step is not on the grid."""
    CLAMPED = 2
    """As by edges; those below are clamped before they are rounded, and not outside the range."""


def learned_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    step_min: float,
    step_max: float,
    mask: GradientMask,
    edges: tuple[float, float],
    share: float,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The gradients of a learned grid; the formulas are in ``learned_fake_quantize``.

    Args:
        grad: Gradient of the result.
        x: The tensor that was quantized.
        scale: Size of a step, float32; a scalar, or one per row of the first axis.
        step_min: Lowest integer in use minus the zero point.
        step_max: Highest integer in use minus the zero point.
        mask: The rule for values that get no gradient.
        edges: The real values that the rule compares with.
        share: How much of a value beyond the edges the scale moves.
        factor: The last two results are multiplied by it.

    Returns:
        The gradients of ``x`` and of the scale, and the sum of what comes from outside the range;
        the last two per row, shape ``(rows,)``.
    """
    rows = _rows(x, scale)
    if not rows or grad.dtype != torch.float32 or not grad.is_cpu:
        return None
    of_x = torch.empty_like(x)
    grad = _laid_out_as(of_x, grad)
    sums = torch.empty(rows, -(-x.numel() // rows // BLOCK), 3, dtype=torch.float64)
    of_scale, outside = x.new_empty(rows), x.new_empty(rows)
    _call(
        *("learned_backward", x, rows, grad, x, of_x, scale, step_min, step_max),
        *(*edges, mask, share, factor, sums, of_scale, outside),
    )
    return of_x, of_scale, outside


def bits_between(x: Tensor, low: float, high: float) -> Tensor | None:
    """A bit per value that is strictly between two real values; packed as by ``pack_bits``."""
    if not _suits(x):
        return None
    bits = room_for_bits(x)
    _call("bits_between", x, 1, x, bits, low, high)
    return bits


def masked(grad: Tensor, bits: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor | None:
    """A gradient where its bit is set, zero elsewhere.

    Args:
        grad: Of any strides.
        bits: In the order of memory of the tensor that they were made for.
        shape: Of that tensor.
        stride: Of that tensor, and of the result.
    """
    if grad.dtype != torch.float32 or not grad.is_cpu:
        return None
    result = torch.empty_strided(shape, stride, dtype=torch.float32)
    if not _suits(result):
        return None
    grad = _laid_out_as(result, grad)
    _call("masked", result, 1, grad, bits, result)
    return result


def restore(int_repr: Tensor, scale: Tensor, zero_point: float) -> Tensor | None:
    """``(integer - zero_point) * scale``, float32, of int8 or uint8."""
    rows = _rows(int_repr, scale, (torch.int8, torch.uint8))
    if not rows:
        return None
    values = torch.empty_like(int_repr, dtype=torch.float32)
    _call(
        "restore", int_repr, rows, int_repr, int_repr.dtype is torch.int8, values, scale, zero_point
    )
    return values


def backend_name() -> str:
    """The way quantizers run on this CPU, in words for a log; compiles the loops first."""
    return "operations of torch" if compiled_loops() is None else "compiled loops"


def _laid_out_as(like: Tensor, x: Tensor) -> Tensor:
    """The values in the same order of memory."""
    same = x.stride() == like.stride() and _suits(x)
    return x if same else torch.empty_like(like).copy_(x)


def _rows(
    x: Tensor, scale: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> int | None:
    """Into how many rows that share a scale a tensor falls; ``None``: the loops do not know it."""
    if not scale.is_cpu or scale.dtype != torch.float32 or not _suits(x, dtypes):
        return None
    return rows_of(x, scale)


def _suits(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether the loops know such a tensor: on a CPU, plain, filled, without gaps in memory."""
    return (
        x.is_cpu
        and x.dtype in dtypes
        and type(x) in (Tensor, nn.Parameter)
        and not is_compiling()
        and not is_transforming()
        and not x.is_neg()  # A view whose memory holds the negated values.
        and fills_its_memory(x)
        and x.data_ptr() != 0  # Nothing, or what torch knows to be zeros.
        and compiled_loops() is not None
    )


def _call(name: str, x: Tensor, rows: int, *arguments: Any) -> None:
    given = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    _loop(name)(rows, x.numel() // rows, *given, torch.get_num_threads())


@cache
def _loop(name: str) -> Callable[..., None]:
    loop: Callable[..., None] = getattr(compiled_loops(), name)
    return loop
