"""The range of least squared error over a histogram of all batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.arithmetic import range_qparams
from lightning_qat.numerics.calibration.powers_of_two import exponent_of, times_power
from lightning_qat.numerics.calibration.search import SAMPLES, sampled, squared_errors
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.numerics.qparams import IntegerGrid

HISTOGRAM_BINS = 8192
"""Bins of a histogram, over values of both signs: a quarter of them at least is in use."""

SMALLEST_REACH = torch.finfo(torch.float32).tiny
"""Where a histogram starts; powers of two of it make wider ones."""


def add_to_histogram(counts: Tensor, reach: Tensor, x: Tensor, samples: int = SAMPLES) -> None:
    """Count the values of one batch, in place; a batch that is not finite is not counted.

    The bins part ``[-reach, reach]``. For larger values ``reach`` doubles until they fit, so that
    bins merge by whole pairs and no count is ever split.

    Args:
        counts: Values per bin, int64, shape ``(HISTOGRAM_BINS,)``.
        reach: Float32 scalar, a power of two; the largest float32 stands for 2**128.
        x: Values of any shape and floating dtype, at least one.
        samples: See ``percentile_range``.
    """
    values, whole = sampled(x, samples), batch_range(x)
    finite = torch.isfinite(whole).all()
    before = exponent_of(reach)
    wider = torch.maximum(before, exponent_of(torch.where(finite, whole.abs().amax(), 0.0)))
    places = _bin(times_power(_centres(counts), before - wider))
    moved = torch.zeros_like(counts).index_add_(0, places, counts)
    index = _bin(times_power(torch.where(finite, values, 0.0), -wider))
    counts.copy_(moved.index_add_(0, index, finite.to(torch.int64).expand(len(index))))
    reach.copy_(times_power(torch.ones_like(reach), wider))


def histogram_range(counts: Tensor, reach: Tensor, grid: IntegerGrid, symmetric: bool) -> Tensor:
    """The range whose grid has the least squared error for all values counted; see ``batch_range``.

    Both ends are searched on their own, in steps of a hundredth of what was seen, one after the
    other and twice. Source: the objective of torch.ao's HistogramObserver.

    Args:
        counts: Values per bin, int64, shape ``(HISTOGRAM_BINS,)``.
        reach: Largest absolute value of the histogram, float32 scalar.
        grid: The integers in use.
        symmetric: Zero point 0.
    """
    # In units of the reach: squares of small and large values are no float32.
    centres = _centres(counts)
    half = 1.0 / HISTOGRAM_BINS
    seen = counts > 0
    low = torch.where(seen, centres - half, torch.inf).amin().clamp(max=0.0)
    high = torch.where(seen, centres + half, -torch.inf).amax().clamp(min=0.0)
    shares = torch.arange(1, 101, device=counts.device, dtype=torch.float32) / 100

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scales, zero_points = range_qparams(lows, highs, grid, symmetric)
        found = squared_errors(centres, scales, zero_points, grid, counts).argmin()
        return lows[found], highs[found]

    lowest, highest = low, high
    for _ in range(2):
        low, high = best(low.expand(100), highest * shares)
        low, high = best(lowest * shares, high.expand(100))
    # A tensor of zeros gives no range.
    found = torch.stack((-low, high)) * (reach > SMALLEST_REACH)
    return times_power(found, exponent_of(reach))


def _centres(counts: Tensor) -> Tensor:
    """The middle of each bin, in units of the reach."""
    steps = torch.arange(HISTOGRAM_BINS, device=counts.device, dtype=torch.float32)
    return (steps + 0.5 - HISTOGRAM_BINS / 2) * (2 / HISTOGRAM_BINS)


def _bin(values: Tensor) -> Tensor:
    """The bin of each value, which is in units of the reach."""
    bins = torch.floor(values * (HISTOGRAM_BINS / 2)) + HISTOGRAM_BINS / 2
    return bins.clamp(0, HISTOGRAM_BINS - 1).to(torch.int64)
