"""The range of least squared error over a histogram of all batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.arithmetic import range_qparams, rounded
from lightning_qat.numerics.calibration.search import SAMPLES, sampled
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.numerics.qparams import IntegerGrid

HISTOGRAM_BINS = 8192
"""Bins of a histogram, over values of both signs: a quarter of them at least is in use."""

SMALLEST_REACH = 2.0**-60
"""Where a histogram starts; powers of two of it make wider ones."""


def add_to_histogram(counts: Tensor, reach: Tensor, x: Tensor, samples: int = SAMPLES) -> None:
    """Count the values of one batch, in place; a batch that is not finite is not counted.

    The bins part ``[-reach, reach]``. For larger values ``reach`` doubles until they fit, so that
    bins merge by whole pairs and no count is ever split.

    Args:
        counts: Values per bin, int64, shape ``(HISTOGRAM_BINS,)``.
        reach: Float32 scalar, a power of two.
        x: Values of any shape and floating dtype, at least one.
        samples: See ``percentile_range``.
    """
    values, whole = sampled(x, samples), batch_range(x)
    finite = torch.isfinite(whole).all()
    largest = torch.where(finite, whole.abs().amax(), 0.0).clamp(min=SMALLEST_REACH)
    wider = torch.maximum(reach, torch.exp2(torch.ceil(torch.log2(largest))))
    moved = torch.zeros_like(counts).index_add_(0, _bin(_centres(reach), wider), counts)
    index = _bin(torch.where(finite, values, 0.0), wider)
    counts.copy_(moved.index_add_(0, index, finite.to(torch.int64).expand(len(index))))
    reach.copy_(wider)


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
    centres, weights = _centres(reach), counts.to(torch.float32)
    half = reach / HISTOGRAM_BINS
    seen = counts > 0
    zero = torch.zeros_like(reach)
    low = torch.where(seen, centres - half, torch.inf).amin().clamp(max=zero)
    high = torch.where(seen, centres + half, -torch.inf).amax().clamp(min=zero)
    shares = torch.arange(1, 101, device=counts.device, dtype=torch.float32) / 100

    def best(lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = range_qparams(lows[:, None], highs[:, None], grid, symmetric)
        errors = (rounded(centres, scale, zero_point, grid) - centres).square() @ weights
        found = errors.argmin()
        return lows[found], highs[found]

    lowest, highest = low, high
    for _ in range(2):
        low, high = best(low.expand(100), highest * shares)
        low, high = best(lowest * shares, high.expand(100))
    # A tensor of zeros gives no range.
    return torch.stack((-low, high)) * (reach > SMALLEST_REACH)


def _centres(reach: Tensor) -> Tensor:
    steps = torch.arange(HISTOGRAM_BINS, device=reach.device, dtype=torch.float32)
    return (steps + 0.5 - HISTOGRAM_BINS / 2) * (2 * reach / HISTOGRAM_BINS)


def _bin(values: Tensor, reach: Tensor) -> Tensor:
    bins = torch.floor(values / (2 * reach / HISTOGRAM_BINS)) + HISTOGRAM_BINS / 2
    return bins.clamp(0, HISTOGRAM_BINS - 1).to(torch.int64)
