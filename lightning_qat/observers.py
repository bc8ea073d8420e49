"""How the ranges of successive batches become one range: pure updates of ``(low, high)``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.arithmetic import affine_qparams, symmetric_scale
from lightning_qat.qparams import Grid

MOVING_AVERAGE_WEIGHT = 0.01
"""Weight of the newest batch in a settled moving average, as in torch's observers."""


def batch_range(x: Tensor) -> Tensor:
    """The range of one batch as ``(-min, max)``, float32.

    Both entries grow with the range, so the range over several calls, or over the processes of a
    distributed run, is an elementwise maximum of such pairs. NaN becomes infinity, which no maximum
    can lose.

    Args:
        x: Values of any shape and floating dtype, at least one element.

    Returns:
        Shape ``(2,)``.

    Example:
        >>> batch_range(torch.tensor([-1.0, 3.0]))
        tensor([1., 3.])
    """
    low, high = torch.aminmax(x.detach())
    return (
        torch.stack((-low, high))
        .to(torch.float32)
        .nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    )


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


UPDATES = {
    "moving_average": moving_average,
    "minmax": minmax,
    "percentile": moving_average,
    "mse": moving_average,
    "entropy": moving_average,
}
"""Calibration name in an ``ActivationSpec`` to its update."""

PERCENTILE = 0.9999
"""Share of a batch's values that ``percentile`` keeps on either side."""

_SAMPLES = 2**15
_BINS = 2048


def percentile_range(x: Tensor, grid: Grid, symmetric: bool) -> Tensor:
    """The range without the farthest 0.01 % of values on either side; see ``batch_range``.

    Of larger tensors 32,768 evenly spaced values stand for all, here and below.
    """
    values, whole = _sampled(x), batch_range(x)
    low = torch.quantile(values, 1.0 - PERCENTILE)
    high = torch.quantile(values, PERCENTILE)
    return _unless_not_finite(whole, torch.stack((-low, high)))


def least_squares_range(x: Tensor, grid: Grid, symmetric: bool) -> Tensor:
    """The share of the batch's range whose grid has the least squared error; see ``batch_range``.

    Searched from 0.1 to 1.2 of the range in steps of 0.01, both ends together, as AMCT's IFMR does
    around its percentiles.
    """
    values, whole = _sampled(x), batch_range(x)
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


def entropy_range(x: Tensor, grid: Grid, symmetric: bool) -> Tensor:
    """The range that keeps most of the batch's information; see ``batch_range``.

    The threshold on absolute values whose clipped histogram, drawn with as many levels as the grid
    has, differs least from the histogram by Kullback and Leibler's measure. Source: the calibration
    of TensorRT (Migacz, GTC 2017).
    """
    values, whole = _sampled(x).abs(), batch_range(x)
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


def _sampled(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _SAMPLES)].to(torch.float32)


def _unless_not_finite(whole: Tensor, found: Tensor) -> Tensor:
    return torch.where(torch.isfinite(whole).all(), found, whole)
