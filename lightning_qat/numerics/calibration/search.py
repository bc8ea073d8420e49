"""How successive batches become one range: pure updates of ``(low, high)``, and of histograms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.numerics.arithmetic import MIN_SCALE, along_axis, range_qparams, rounded
from lightning_qat.numerics.calibration.powers_of_two import exponent_of, times_power
from lightning_qat.numerics.min_max import batch_range, spacing
from lightning_qat.numerics.qparams import IntegerGrid

PERCENTILE = 0.9999
"""Share of a batch's values that ``percentile`` keeps on either side."""

SAMPLES = 2**15
"""Values of a batch that searches and histograms look at, unless they are told otherwise."""

SHARES = tuple(torch.arange(0.1, 1.2, 0.01).tolist())
"""Of a range, where the least squared error is searched."""

_MOST_LEVELS = 2**10
"""A sum for every level of a finer grid takes longer than rounding all values."""

_BINS = 2048

_MOST_FOR_QUANTILE = 2**23
"""torch.quantile takes no more than 16 million values."""


def percentile_range(
    x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES
) -> Tensor:
    """The range without the farthest 0.01 % of values on either side; see ``batch_range``.

    Of larger tensors at most ``samples`` evenly spaced values stand for all, here and below; what
    is not finite is seen wherever it is.
    """
    values, whole, exponent = _near_one(x, min(samples, _MOST_FOR_QUANTILE))
    low = torch.quantile(values, 1.0 - PERCENTILE)
    high = torch.quantile(values, PERCENTILE)
    return _range_of(torch.stack((-low, high)), whole, exponent)


def least_squares_range(
    x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES
) -> Tensor:
    """The share of the batch's range whose grid has the least squared error; see ``batch_range``.

    Searched from 0.1 to 1.2 of the range in steps of 0.01, both ends together, as AMCT's IFMR does
    around its percentiles.
    """
    values, whole, exponent = _near_one(x, samples)
    shares = values.new_tensor(SHARES)
    scales, zero_points = range_qparams(-whole[0] * shares, whole[1] * shares, grid, symmetric)
    errors = squared_errors(values.sort().values, scales, zero_points, grid)
    return _range_of(whole * shares[errors.argmin()], whole, exponent)


def squared_errors(
    values: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    grid: IntegerGrid,
    counts: Tensor | None = None,
) -> Tensor:
    """What rounding to each of many grids costs: ``sum(counts * (rounded - value)^2)``.

    Values that round to the same ``r`` are neighbours, so that sums of values up to the borders
    give ``sum(r^2 - 2 r value)``; the values are looked at once, not once a grid.

    Args:
        values: Real values in rising order, (n,).
        scales: One of each grid, (grids,).
        zero_points: Likewise.
        grid: The integers in use.
        counts: How often there is each value, (n,); ``None``: once.

    Returns:
        (grids,), float64.

    Example:
        >>> x = torch.tensor([0.0, 0.4, 1.0])
        >>> squared_errors(x, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 0.0]), IntegerGrid(0, 3))
        tensor([0.1600, 0.0100], dtype=torch.float64)
    """
    exact = values.to(torch.float64)
    weights = torch.ones_like(exact) if counts is None else counts.to(torch.float64)
    steps = torch.arange(grid.qmin, grid.qmax + 1, device=values.device) - zero_points[:, None]
    if steps.shape[1] > _MOST_LEVELS:
        pairs = zip(scales, zero_points, strict=True)
        errors = [
            (rounded(values, *pair, grid) - values).square() @ weights.float() for pair in pairs
        ]
        return torch.stack(errors).to(torch.float64)
    until = F.pad(torch.stack((weights, weights * exact)).cumsum(1), (1, 0))
    borders = torch.searchsorted(values, (steps[:, :-1] + 0.5) * scales[:, None])
    ends = F.pad(F.pad(borders, (1, 0)), (0, 1), value=len(values))
    in_level, sums = until[:, ends].diff()
    levels = (steps * scales[:, None]).to(torch.float64)
    errors_of_levels: Tensor = levels.square() * in_level - 2 * levels * sums
    return errors_of_levels.sum(1) + exact.square() @ weights


def least_squares_scale(
    x: Tensor, scale: Tensor, grid: IntegerGrid, axis: int | None = None
) -> Tensor:
    """The scale with the least squared error of a symmetric grid, near a given one.

    Args:
        x: Real values, float32.
        scale: Where to search, per tensor or per channel; see ``least_squares_share``.
        grid: The integers in use.
        axis: Channel axis of ``scale``.

    Returns:
        The shape of ``scale``.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0, 1.4])
        >>> least_squares_scale(x, torch.tensor(1.4), IntegerGrid(-1, 1))
        tensor(1.1340)
    """
    exponent = exponent_of(scale)
    x = times_power(x.detach().to(torch.float32), along_axis(-exponent, x.dim(), axis))
    near_one = times_power(scale, -exponent)
    others = [a for a in range(x.dim()) if a != axis]

    def squared_error(share: float) -> Tensor:
        wide = along_axis(near_one * share, x.dim(), axis)
        error = (rounded(x, wide, 0.0, grid) - x).square()
        if axis is None:
            return error.sum()
        return error.sum(others) if others else error

    return (scale * least_squares_share(squared_error)).clamp(min=MIN_SCALE)


def least_squares_share(squared_error: Callable[[float], Tensor]) -> Tensor:
    """The share of a range, of 0.1, 0.11, ..., 1.19, that has the least squared error.

    Args:
        squared_error: The error at a share, one value for each range that is searched.

    Returns:
        The shape of the error, float32; 1 where no error is a number.
    """
    best: Tensor | None = None
    least: Any = torch.inf
    for share in SHARES:
        error = squared_error(share)
        best = torch.ones_like(error) if best is None else best
        better = error < least
        best, least = torch.where(better, share, best), torch.where(better, error, least)
    assert best is not None
    return best


def entropy_range(x: Tensor, grid: IntegerGrid, symmetric: bool, samples: int = SAMPLES) -> Tensor:
    """The range that keeps most of the batch's information; see ``batch_range``.

    The threshold on absolute values whose clipped histogram, drawn with as many levels as the grid
    has, differs least from the histogram by Kullback and Leibler's measure. Source: the calibration
    of TensorRT (Migacz, GTC 2017).
    """
    values, whole, exponent = _near_one(x, samples)
    values = values.abs()
    levels = min((grid.qmax - grid.qmin + 1) // (2 if symmetric else 1), _BINS // 2)
    largest = values.max().nan_to_num(nan=0.0, posinf=0.0)
    if not bool(torch.isfinite(whole).all()) or not bool(largest > 0):
        return _range_of(whole, whole, exponent)
    counts = torch.histc(values, _BINS, 0.0, float(largest)).to(torch.float64)
    # As in NVIDIA's pytorch-quantization: zeros are exact on every grid. Half of what relu gives is
    # zeros; counted, they outweigh the tail, of which 2 to 10 % was cut off.
    counts[0] = counts[1]
    step = max(1, (_BINS - levels) // 100)
    kept = torch.arange(levels, _BINS + 1, step, device=x.device).unsqueeze(1)
    bins = torch.arange(_BINS, device=x.device)
    inside = bins < kept
    clipped = counts * inside
    clipped += (bins == kept - 1) * (counts.sum() - clipped.sum(1, keepdim=True))
    # Every level gets the mean of its filled bins.
    level = (bins * levels // kept).clamp(max=levels - 1)
    filled = ((counts > 0) & inside).to(torch.float64)
    empty = counts.new_zeros(len(kept), levels)
    mass, number = (empty.scatter_add(1, level, found) for found in (counts * inside, filled))
    drawn = (mass / number.clamp(min=1)).gather(1, level) * filled
    p, q = clipped / clipped.sum(1, keepdim=True), drawn / drawn.sum(1, keepdim=True)
    differing = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0)
    distances = differing.sum(1).nan_to_num(nan=torch.inf)
    # Where nothing is left to compare, all is kept.
    best = torch.where(distances.amin().isinf(), _BINS, kept[distances.argmin(), 0])
    return _range_of(torch.minimum(whole, largest * (best / _BINS)), whole, exponent)


def sampled(x: Tensor, samples: int) -> Tensor:
    """About ``samples`` evenly spaced values of a tensor, flat, as float32."""
    flat = x.detach().reshape(-1)
    return flat[:: spacing(flat.numel(), samples)].to(torch.float32)


def _near_one(x: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """A sample and the range of a tensor over a power of two, and the exponent of that."""
    whole = batch_range(x)
    exponent = exponent_of(whole.abs().amax())
    unit = torch.where(torch.isfinite(whole), times_power(whole, -exponent), whole)
    return times_power(sampled(x, samples), -exponent), unit, exponent


def _range_of(found: Tensor, whole: Tensor, exponent: Tensor) -> Tensor:
    """A range found near 1 as that of the tensor; one that is not finite is the whole one."""
    return torch.where(torch.isfinite(whole).all(), times_power(found, exponent), whole)
