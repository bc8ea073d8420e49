"""The kernels: what runs on the device. ``activations.py`` and its neighbours launch them.

The numbers are those of the loops and of torch's operations to the bit: float32 whatever the dtype,
true division, ties to even, NaN stays NaN. ``launch.py`` forbids fused multiply-adds, which would
round once less.

A tensor is flat, in the order of memory: ``rows`` times ``cols`` values; a row shares a scale. A
program takes ``RUNS`` runs of 512 values. A run is 8 lanes of 64 values, whose bits share bytes as
``pack_bits`` has it: value ``i`` of a run is bit ``i // 64`` of byte ``i % 64``.
"""

# A kernel calls functions of Triton, which return nothing that pyright knows.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from lightning_qat.numerics.gpu.device_grid import GridRule

_RANGE = tl.constexpr(int(GridRule.RANGE))
_RANGE_FROM_ZERO = tl.constexpr(int(GridRule.RANGE_FROM_ZERO))
_SYMMETRIC_RANGE = tl.constexpr(int(GridRule.SYMMETRIC_RANGE))
_SYMMETRIC_CLIP = tl.constexpr(int(GridRule.SYMMETRIC_CLIP))
_HALF_WIDTH = tl.constexpr(int(GridRule.HALF_WIDTH))
_HALF_WIDTH_FROM_ZERO = tl.constexpr(int(GridRule.HALF_WIDTH_FROM_ZERO))
_HALF_WIDTH_AND_LOW = tl.constexpr(int(GridRule.HALF_WIDTH_AND_LOW))

_MIN_SCALE = tl.constexpr(2.0**-126)
_AMCT_MIN_SCALE = tl.constexpr(2.0**-23)


@triton.jit
def _clamped(value, low, high):
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def _rounded(value):
    """Ties to even, for absolute values below 2**22; the sign of zero stays."""
    magic = 12582912.0
    near = (value + magic) - magic
    return tl.where(near == 0.0, value * 0.0, near)


@triton.jit
def _or_one(scale, smallest: tl.constexpr):
    return tl.where(scale < smallest, 1.0, scale)


@triton.jit
def _zero_point(low, scale, QMIN: tl.constexpr, QMAX: tl.constexpr):
    return _rounded(_clamped(QMIN * 1.0 - tl.div_rn(low, scale), QMIN * 1.0, QMAX * 1.0))


@triton.jit
def _scale_and_zero_point(
    first, second, RULE: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr
):
    """See ``GridRule``, and ``arithmetic.py`` for the formulas."""
    zero = first * 0.0
    if RULE == _RANGE:
        low = tl.where(first > 0.0, 0.0, first)
        high = tl.where(second < 0.0, 0.0, second)
        # By halves: the width of a range may be beyond float32.
        scale = _or_one(tl.div_rn(high * 0.5 - low * 0.5, (QMAX * 1.0 - QMIN) / 2.0), _MIN_SCALE)
        zero = _zero_point(low, scale, QMIN, QMAX)
    elif RULE == _RANGE_FROM_ZERO:
        high = tl.where(second < 0.0, 0.0, second)
        scale = _or_one(tl.div_rn(high, QMAX * 1.0 - QMIN), _MIN_SCALE)
        zero = QMIN * 1.0
    elif RULE == _SYMMETRIC_RANGE:
        low, high = tl.abs(first), tl.abs(second)
        largest = tl.where((low > high) | (low != low), low, high)
        scale = _or_one(tl.div_rn(largest, QMAX * 1.0), _MIN_SCALE)
        zero = 0.0
    elif RULE == _SYMMETRIC_CLIP:
        high = tl.where(second < 0.0, 0.0, second)
        scale = _or_one(tl.div_rn(high, QMAX * 1.0), _MIN_SCALE)
        zero = 0.0
    elif RULE == _HALF_WIDTH or RULE == _HALF_WIDTH_FROM_ZERO or RULE == _HALF_WIDTH_AND_LOW:
        scale = tl.div_rn(tl.abs(first), ((QMAX - QMIN + 2) // 2) * 1.0)
        scale = tl.where(scale < _MIN_SCALE, _MIN_SCALE, scale)
        zero = 0.0
        if RULE == _HALF_WIDTH_FROM_ZERO:
            zero = QMIN * 1.0
        elif RULE == _HALF_WIDTH_AND_LOW:
            zero = _zero_point(second, scale, QMIN, QMAX)
    else:
        scale = first
        zero = second
    return scale, zero


@triton.jit
def _places(start, RUNS: tl.constexpr):
    """Where the values of a program are, and their bytes of bits."""
    runs = tl.arange(0, RUNS)
    places = tl.arange(0, 64)[None, None, :]
    lanes = tl.arange(0, 8)[None, :, None] * 64
    return start + (runs[:, None, None] * 512 + lanes + places)


@triton.jit
def _byte_places(start, RUNS: tl.constexpr):
    return start // 8 + (tl.arange(0, RUNS)[:, None] * 64 + tl.arange(0, 64)[None, :])


@triton.jit
def _note_range(range_ptr, values, inside, RUNS: tl.constexpr):
    """Widen ``(-min, max)``; infinity where a value is NaN."""
    high = tl.where(values != values, float("inf"), values)
    low = tl.where(values != values, float("inf"), -values)
    highest = tl.max(tl.reshape(tl.where(inside, high, float("-inf")), (RUNS * 512,)), axis=0)
    lowest = tl.max(tl.reshape(tl.where(inside, low, float("-inf")), (RUNS * 512,)), axis=0)
    tl.atomic_max(range_ptr, lowest, sem="relaxed")
    tl.atomic_max(range_ptr + 1, highest, sem="relaxed")


@triton.jit
def fake_quantize(
    x_ptr,
    first_ptr,
    second_ptr,
    y_ptr,
    bits_ptr,
    codes_ptr,
    numbers_ptr,
    range_ptr,
    cols,
    chunks,
    second_step,
    clamp_low,
    clamp_high,
    RULE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BITS: tl.constexpr,
    CODES: tl.constexpr,
    OBSERVE: tl.constexpr,
    RUNS: tl.constexpr,
):
    """Values on the grid; where wanted a bit per value, integers with their numbers, the range.

    Values are clamped to ``clamp_low`` and ``clamp_high`` first. The gradient passes strictly
    between these, where the step is on the grid.
    """
    row = tl.program_id(0) // chunks
    scale, zero = _scale_and_zero_point(
        tl.load(first_ptr + row), tl.load(second_ptr + row * second_step), RULE, QMIN, QMAX
    )
    step_min, step_max = QMIN - zero, QMAX - zero
    start = (tl.program_id(0) % chunks).to(tl.int64) * (RUNS * 512)
    at = _places(start, RUNS)
    inside = at < cols
    of_row = row.to(tl.int64) * cols
    given = tl.load(x_ptr + of_row + at, mask=inside, other=0.0).to(tl.float32)
    values = _clamped(given, clamp_low, clamp_high)
    if OBSERVE:
        _note_range(range_ptr, values, inside, RUNS)
    # One step wider than the grid tells what lies outside, and bounds what is rounded.
    wide = _rounded(_clamped(tl.div_rn(values, scale), step_min - 1.0, step_max + 1.0))
    steps = _clamped(wide, step_min, step_max)
    tl.store(y_ptr + of_row + at, (steps * scale).to(y_ptr.dtype.element_ty), mask=inside)
    if CODES:
        codes = (steps + zero).to(tl.int32).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + of_row + at, codes, mask=inside)
        tl.store(numbers_ptr + row, scale)
        tl.store(numbers_ptr + tl.num_programs(0) // chunks + row, zero)
    if BITS:
        stopped = (wide < step_min) | (wide > step_max)
        stopped = stopped | (given <= clamp_low) | (given >= clamp_high)
        flags = tl.where(inside & (stopped == 0), 1, 0) << tl.arange(0, 8)[None, :, None]
        bytes_at = _byte_places(start, RUNS)
        packed = tl.sum(flags, axis=1).to(tl.uint8)
        tl.store(bits_ptr + bytes_at, packed, mask=bytes_at < (cols + 511) // 512 * 64)


@triton.jit
def value_range(x_ptr, range_ptr, cols, clamp_low, clamp_high, RUNS: tl.constexpr):
    """The range alone, of values clamped to two ends."""
    at = _places(tl.program_id(0).to(tl.int64) * (RUNS * 512), RUNS)
    inside = at < cols
    values = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    _note_range(range_ptr, _clamped(values, clamp_low, clamp_high), inside, RUNS)


@triton.jit
def masked(grad_ptr, bits_ptr, result_ptr, cols, RUNS: tl.constexpr):
    """A gradient where its bit is set, zero elsewhere."""
    start = tl.program_id(0).to(tl.int64) * (RUNS * 512)
    at, bytes_at = _places(start, RUNS), _byte_places(start, RUNS)
    inside = at < cols
    packed = tl.load(bits_ptr + bytes_at, mask=bytes_at < (cols + 511) // 512 * 64, other=0)
    flags = (packed.to(tl.int32)[:, None, :] >> tl.arange(0, 8)[None, :, None]) & 1
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
    tl.store(result_ptr + at, tl.where(flags != 0, grad, 0.0), mask=inside)


@triton.jit
def restore(
    codes_ptr,
    scales_ptr,
    zero_points_ptr,
    y_ptr,
    cols,
    chunks,
    FROM_ZERO: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The real values of integers; ``FROM_ZERO``: the zero points are 0."""
    row = tl.program_id(0) // chunks
    scale = tl.load(scales_ptr + row)
    zero = 0.0
    if not FROM_ZERO:
        zero = tl.load(zero_points_ptr + row)
    at = _places((tl.program_id(0) % chunks).to(tl.int64) * (RUNS * 512), RUNS)
    of_row = row.to(tl.int64) * cols
    codes = tl.load(codes_ptr + of_row + at, mask=at < cols, other=0).to(tl.float32)
    values = ((codes - zero) * scale).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + of_row + at, values, mask=at < cols)


@triton.jit
def learned_backward(
    grad_ptr,
    x_ptr,
    first_ptr,
    second_ptr,
    of_x_ptr,
    sums_ptr,
    cols,
    chunks,
    clamp_high,
    RULE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    CLAMPED: tl.constexpr,
    RUNS: tl.constexpr,
):
    """The gradient of the values, and three sums per program for ``learned_finish``.

    ``learned_fake_quantize.py`` has the formulas. With ``CLAMPED`` values are clamped to zero and
    ``clamp_high`` first.
    """
    row = tl.program_id(0) // chunks
    scale, zero = _scale_and_zero_point(
        tl.load(first_ptr + row), tl.load(second_ptr + row), RULE, QMIN, QMAX
    )
    step_min, step_max = QMIN - zero, QMAX - zero
    at = _places((tl.program_id(0) % chunks).to(tl.int64) * (RUNS * 512), RUNS)
    inside = at < cols
    of_row = row.to(tl.int64) * cols
    x = tl.load(x_ptr + of_row + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + of_row + at, mask=inside, other=0.0).to(tl.float32)
    values = x
    if CLAMPED:
        values = _clamped(x, 0.0, clamp_high)
    wide = _rounded(_clamped(tl.div_rn(values, scale), step_min - 1.0, step_max + 1.0))
    points = _clamped(wide, step_min, step_max) * scale
    beyond = (wide < step_min) | (wide > step_max)
    stopped = beyond
    if CLAMPED:
        stopped = beyond | (x <= 0.0) | (x >= clamp_high)
    passed = tl.where(stopped, 0.0, grad)
    tl.store(of_x_ptr + of_row + at, passed.to(of_x_ptr.dtype.element_ty), mask=inside)
    kept = tl.where(inside & stopped, grad, 0.0)
    # What is beyond the grid moves with its end; what a clamp stops below it was rounded there.
    moved = passed * (points - values) + kept * (points - tl.where(beyond, 0.0, values))
    outside = kept
    if CLAMPED:
        outside = tl.where(x > 0.0, kept, 0.0)
    outside = tl.where(beyond, outside, 0.0)
    moved = tl.where(inside, moved, 0.0)
    program = tl.program_id(0).to(tl.int64)
    tl.store(sums_ptr + 2 * program, tl.sum(tl.reshape(moved, (RUNS * 512,)), axis=0))
    tl.store(sums_ptr + 2 * program + 1, tl.sum(tl.reshape(outside, (RUNS * 512,)), axis=0))


@triton.jit
def learned_finish(
    sums_ptr,
    first_ptr,
    second_ptr,
    of_first_ptr,
    of_second_ptr,
    chunks,
    factor,
    RULE: tl.constexpr,
    QMIN: tl.constexpr,
    QMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of the two tensors of the grid, from the sums of a row; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    first, second = tl.load(first_ptr + row), tl.load(second_ptr + row)
    scale, zero = _scale_and_zero_point(first, second, RULE, QMIN, QMAX)
    moved = tl.zeros((BLOCK,), tl.float64)
    outside = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums = sums_ptr + 2 * (row * chunks + at)
        moved += tl.load(sums, mask=at < chunks, other=0.0).to(tl.float64)
        outside += tl.load(sums + 1, mask=at < chunks, other=0.0).to(tl.float64)
    of_scale = tl.sum(moved, axis=0) / scale.to(tl.float64) * factor
    of_low = tl.sum(outside, axis=0) * factor
    if RULE == _HALF_WIDTH_AND_LOW or RULE == _RANGE:
        # The lower end takes along what lies outside.
        of_scale -= (QMIN - zero).to(tl.float64) * of_low
    if RULE == _HALF_WIDTH or RULE == _HALF_WIDTH_FROM_ZERO or RULE == _HALF_WIDTH_AND_LOW:
        sign = tl.where(first > 0.0, 1.0, tl.where(first < 0.0, -1.0, 0.0))
        smallest = _MIN_SCALE * (((QMAX - QMIN + 2) // 2) * 1.0)
        of_scale = tl.where(tl.abs(first) < smallest, 0.0, of_scale * sign.to(tl.float64))
        tl.store(of_first_ptr + row, of_scale.to(tl.float32))
        if RULE == _HALF_WIDTH_AND_LOW:
            tl.store(of_second_ptr + row, of_low.to(tl.float32))
    else:
        low = tl.where(first > 0.0, 0.0, first)
        high = tl.where(second < 0.0, 0.0, second)
        half, steps = high * 0.5 - low * 0.5, QMAX * 1.0 - QMIN
        if RULE == _RANGE_FROM_ZERO:
            half = high * 0.5
        elif RULE == _SYMMETRIC_CLIP:
            half, steps = high * 0.5, QMAX * 1.0
        of_end = tl.where(tl.div_rn(half, steps / 2.0) < _MIN_SCALE, 0.0, of_scale / steps)
        tl.store(of_second_ptr + row, tl.where(second < 0.0, 0.0, of_end).to(tl.float32))
        if RULE == _RANGE:
            of_low = tl.where(first > 0.0, 0.0, of_low - of_end)
            tl.store(of_first_ptr + row, of_low.to(tl.float32))
