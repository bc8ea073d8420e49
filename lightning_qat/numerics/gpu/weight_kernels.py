"""The kernels of weights: all of a model in as many launches as of one.

A program takes a piece of a weight whose values share a scale. The table has a row per piece:

====================  ===========================================================
``address``           of its first value
``offset``            of its first result, in the memory of all results
``count``             how many values it has, at most ``BLOCK``
``channel``           the number of its scale, of all scales
====================  ===========================================================
"""

# A kernel calls functions of Triton, which return nothing that pyright knows.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lightning_qat.numerics.gpu.kernels import (
    _AMCT_MIN_SCALE,
    _MIN_SCALE,
    _clamped,
    _or_one,
    _rounded,
)


@triton.jit
def _piece(table_ptr, like_ptr, BLOCK: tl.constexpr):
    row = table_ptr + tl.program_id(0).to(tl.int64) * 4
    address = tl.load(row).to(tl.pointer_type(like_ptr.dtype.element_ty))
    at = tl.arange(0, BLOCK)
    inside = at < tl.load(row + 2)
    values = tl.load(address + at, mask=inside, other=0.0).to(tl.float32)
    return values, tl.load(row + 1) + at, inside, tl.load(row + 3)


@triton.jit
def weight_ranges(table_ptr, like_ptr, ranges_ptr, BLOCK: tl.constexpr):
    """Widen the ``(-min, max)`` of each channel; infinity where a weight is NaN."""
    values, _, inside, channel = _piece(table_ptr, like_ptr, BLOCK)
    nan = values != values
    high = tl.where(inside, tl.where(nan, float("inf"), values), float("-inf"))
    low = tl.where(inside, tl.where(nan, float("inf"), -values), float("-inf"))
    tl.atomic_max(ranges_ptr + 2 * channel, tl.max(low, axis=0), sem="relaxed")
    tl.atomic_max(ranges_ptr + 2 * channel + 1, tl.max(high, axis=0), sem="relaxed")


@triton.jit
def quantize_weights(
    table_ptr,
    like_ptr,
    ranges_ptr,
    y_ptr,
    codes_ptr,
    scales_ptr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    ARQ: tl.constexpr,
    CODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round each weight to the grid of its channel's range; ``arithmetic.py`` has both rules."""
    values, offsets, inside, channel = _piece(table_ptr, like_ptr, BLOCK)
    low = tl.abs(tl.load(ranges_ptr + 2 * channel))
    high = tl.abs(tl.load(ranges_ptr + 2 * channel + 1))
    largest = tl.where(low > high, low, high)
    if ARQ:
        end = tl.where(low > high, -QMIN * 1.0, QMAX * 1.0)
        scale = _or_one(tl.div_rn(largest, end), _AMCT_MIN_SCALE)
    else:
        scale = _or_one(tl.div_rn(largest, (QMAX * 1.0 - QMIN) / 2.0), _MIN_SCALE)
    # A channel that is not finite has no grid.
    scale = tl.where(scale == float("inf"), float("nan"), scale)
    steps = _rounded(_clamped(tl.div_rn(values, scale), QMIN * 1.0, QMAX * 1.0))
    tl.store(y_ptr + offsets, (steps * scale).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + channel, scale)
    if CODES:
        tl.store(codes_ptr + offsets, steps.to(tl.int32).to(tl.int8), mask=inside)
