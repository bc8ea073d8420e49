"""How successive batches become one range: pure updates of ``(low, high)``, and of histograms."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.arithmetic import affine_qparams, symmetric_scale
from lightning_qat.numerics.min_max import batch_range, spacing
from lightning_qat.numerics.qparams import IntegerGrid

PERCENTILE = 0.9999
"""Share of a batch's values that ``percentile`` keeps on either side."""

SAMPLES = 2**15
"""Values of a batch that searches and histograms look at, unless they are told otherwise."""

_BINS = 2048


def percentile_range(
    x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES
) -> Tensor:
    """The range without the farthest 0.01 % of values on either side; see ``batch_range``.

    Of larger tensors at most ``samples`` evenly spaced values stand for all, here and below; what
    is not finite is seen wherever it is.
    """
    values, whole = sampled(x, samples), batch_range(x)
    low = torch.quantile(values, 1.0 - PERCENTILE)
    high = torch.quantile(values, PERCENTILE)
    return _unless_not_finite(whole, torch.stack((-low, high)))


def least_squares_range(
    x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES
) -> Tensor:
    """The share of the batch's range whose grid has the least squared error; see ``batch_range``.

    Searched from 0.1 to 1.2 of the range in steps of 0.01, both ends together, as AMCT's IFMR does
    around its percentiles.
    """
    values, whole = sampled(x, samples), batch_range(x)
    best, least = whole, torch.full_like(whole[0], torch.inf)
    for share in torch.arange(0.1, 1.2, 0.01).tolist():
        low, high = -whole[0] * share, whole[1] * share
        if symmetric:
            scale = symmetric_scale(
                torch.maximum(low.abs(), high.abs()), IntegerGrid(-grid.qmax, grid.qmax)
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


def entropy_range(x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES) -> Tensor:
    """The range that keeps most of the batch's information; see ``batch_range``.

    The threshold on absolute values whose clipped histogram, drawn with as many levels as the grid
    has, differs least from the histogram by Kullback and Leibler's measure. Source: the calibration
    of TensorRT (Migacz, GTC 2017).
    """
    values, whole = sampled(x, samples).abs(), batch_range(x)
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


def sampled(x: Tensor, samples: int) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: spacing(flat.numel(), samples)].to(torch.float32)


def _unless_not_finite(whole: Tensor, found: Tensor) -> Tensor:
    return torch.where(torch.isfinite(whole).all(), found, whole)
