"""How successive batches become one range: pure updates of ``(low, high)``, and of histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.arithmetic import affine_qparams, symmetric_scale
from lightning_qat.qparams import Grid
from lightning_qat.ranges import batch_range, spacing

MOVING_AVERAGE_WEIGHT = 0.01
"""Weight of the newest batch in a settled moving average, as in torch's observers."""


def moving_average(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Move ``low`` and ``high`` towards the range of one batch, in place.

    ``range += (batch - range) * max(0.01, 1 / (batches + 1))``: a plain mean over the first 100
    batches, so that a short calibration weighs its batches alike, then an exponential average.

    Args:
        low: Lower end so far, scalar.
        high: Upper end so far, scalar.
        batch: ``(-min, max)`` of the batch.
        batches: How many batches ``low`` and ``high`` stand for, scalar.
    """
    weight = torch.clamp(1.0 / (batches + 1.0), min=MOVING_AVERAGE_WEIGHT)
    low.lerp_(-batch[0], weight)
    high.lerp_(batch[1], weight)


def minmax(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Widen ``low`` and ``high`` to the range of one batch, in place; arguments as above.

    The very first batch replaces what stands there.
    """
    first = batches == 0
    low.copy_(torch.where(first, -batch[0], torch.minimum(low, -batch[0])))
    high.copy_(torch.where(first, batch[1], torch.maximum(high, batch[1])))


def replaced(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Take the newest range, which stands for all batches, in place; arguments as above.

    A range that is not finite stays, for the conversion to refuse.
    """
    low.copy_(torch.where(low.isinf(), low, -batch[0]))
    high.copy_(torch.where(high.isinf(), high, batch[1]))


UPDATES = {
    "moving_average": moving_average,
    "minmax": minmax,
    "histogram": replaced,
    "percentile": moving_average,
    "mse": moving_average,
    "entropy": moving_average,
}
"""Calibration name in an ``ActivationSpec`` to its update."""

PERCENTILE = 0.9999
"""Share of a batch's values that ``percentile`` keeps on either side."""

SAMPLES = 2**15
"""Values of a batch that searches and histograms look at, unless they are told otherwise."""

_BINS = 2048


def percentile_range(x: Tensor, grid: Grid, symmetric: bool, samples: int = SAMPLES) -> Tensor:
    """The range without the farthest 0.01 % of values on either side; see ``batch_range``.

    Of larger tensors at most ``samples`` evenly spaced values stand for all, here and below; what
    is not finite is seen wherever it is.
    """
    values, whole = _sampled(x, samples), batch_range(x)
    low = torch.quantile(values, 1.0 - PERCENTILE)
    high = torch.quantile(values, PERCENTILE)
    return _unless_not_finite(whole, torch.stack((-low, high)))


def least_squares_range(x: Tensor, grid: Grid, symmetric: bool, samples: int = SAMPLES) -> Tensor:
    """The share of the batch's range whose grid has the least squared error; see ``batch_range``.

    Searched from 0.1 to 1.2 of the range in steps of 0.01, both ends together, as AMCT's IFMR does
    around its percentiles.
    """
    values, whole = _sampled(x, samples), batch_range(x)
    best, least = whole, torch.full_like(whole[0], torch.inf)
    for share in torch.arange(0.1, 1.2, 0.01).tolist():
        low, high = -whole[0] * share, whole[1] * share
        if symmetric:
            scale = symmetric_scale(
                torch.maximum(low.abs(), high.abs()), Grid(-grid.qmax, grid.qmax)
            )
            zero_point = torch.zeros_like(scale)
        else:
            scale, zero_point = affine_qparams(low, high, grid)
        integers = torch.clamp(torch.round(values / scale) + zero_point, grid.qmin, grid.qmax)
        error = ((integers - zero_point) * scale - values).square().sum()
        better = error < least
        best = torch.where(better, whole * share, best)
        least = torch.where(better, error, least)
    return _unless_not_finite(whole, best)


def entropy_range(x: Tensor, grid: Grid, symmetric: bool, samples: int = SAMPLES) -> Tensor:
    """The range that keeps most of the batch's information; see ``batch_range``.

    The threshold on absolute values whose clipped histogram, drawn with as many levels as the grid
    has, differs least from the histogram by Kullback and Leibler's measure. Source: the calibration
    of TensorRT (Migacz, GTC 2017).
    """
    values, whole = _sampled(x, samples).abs(), batch_range(x)
    levels = min((grid.qmax - grid.qmin + 1) // (2 if symmetric else 1), _BINS // 2)
    largest = values.max().nan_to_num(nan=0.0, posinf=0.0)
    if not bool(torch.isfinite(whole).all()) or not bool(largest > 0):
        return whole
    counts = torch.histc(values, _BINS, 0.0, float(largest)).to(torch.float64)
    best, least = _BINS, torch.inf
    for kept in range(levels, _BINS + 1, max(1, (_BINS - levels) // 100)):
        clipped = counts[:kept].clone()
        clipped[-1] += counts[kept:].sum()
        # Every level gets the mean of its filled bins.
        level = torch.arange(kept) * levels // kept
        filled = (counts[:kept] > 0).to(torch.float64)
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, counts[:kept].cpu())
        bins = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled.cpu())
        drawn = (mass / bins.clamp(min=1))[level] * filled.cpu()
        p, q = clipped.cpu() / clipped.sum().cpu(), drawn / drawn.sum()
        seen = p > 0
        distance = float((p[seen] * (p[seen] / q[seen].clamp(min=1e-12)).log()).sum())
        if distance < least:
            best, least = kept, distance
    return torch.minimum(whole, largest * (best / _BINS))


SEARCHES = {
    "percentile": percentile_range,
    "mse": least_squares_range,
    "entropy": entropy_range,
}
"""Calibration name to how one batch's range is found, where it is not its minimum and maximum."""


BY_RANGE = ("moving_average", "minmax")
"""Calibrations that need nothing of a batch but its minimum and maximum."""

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
    values, whole = _sampled(x, samples), batch_range(x)
    finite = torch.isfinite(whole).all()
    largest = torch.where(finite, whole.abs().amax(), 0.0).clamp(min=SMALLEST_REACH)
    wider = torch.maximum(reach, torch.exp2(torch.ceil(torch.log2(largest))))
    moved = torch.zeros_like(counts).index_add_(0, _bin(_centres(reach), wider), counts)
    index = _bin(torch.where(finite, values, 0.0), wider)
    counts.copy_(moved.index_add_(0, index, finite.to(torch.int64).expand(len(index))))
    reach.copy_(wider)


def histogram_range(counts: Tensor, reach: Tensor, grid: Grid, symmetric: bool) -> Tensor:
    """The range whose grid has the least squared error for all values counted; see ``batch_range``.

    Both ends are searched on their own, in steps of a hundredth of what was seen, one after the
    other and twice. Source: the objective of torch.ao's HistogramObserver.

    Args:
        counts: As ``add_to_histogram`` left it.
        reach: As ``add_to_histogram`` left it.
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
        if symmetric:
            scale = symmetric_scale(torch.maximum(-lows, highs), Grid(-grid.qmax, grid.qmax))
            zero_point = torch.zeros_like(scale)
        else:
            scale, zero_point = affine_qparams(lows, highs, grid)
        scale, zero_point = scale[:, None], zero_point[:, None]
        integers = torch.clamp(torch.round(centres / scale) + zero_point, grid.qmin, grid.qmax)
        errors = ((integers - zero_point) * scale - centres).square() @ weights
        found = errors.argmin()
        return lows[found], highs[found]

    lowest, highest = low, high
    for _ in range(2):
        low, high = best(low.expand(100), highest * shares)
        low, high = best(lowest * shares, high.expand(100))
    # Of nothing but zeros no range is known.
    return torch.stack((-low, high)) * (reach > SMALLEST_REACH)


def _centres(reach: Tensor) -> Tensor:
    steps = torch.arange(HISTOGRAM_BINS, device=reach.device, dtype=torch.float32)
    return (steps + 0.5 - HISTOGRAM_BINS / 2) * (2 * reach / HISTOGRAM_BINS)


def _bin(values: Tensor, reach: Tensor) -> Tensor:
    bins = torch.floor(values / (2 * reach / HISTOGRAM_BINS)) + HISTOGRAM_BINS / 2
    return bins.clamp(0, HISTOGRAM_BINS - 1).to(torch.int64)


def _sampled(x: Tensor, samples: int) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: spacing(flat.numel(), samples)].to(torch.float32)


def _unless_not_finite(whole: Tensor, found: Tensor) -> Tensor:
    return torch.where(torch.isfinite(whole).all(), found, whole)
