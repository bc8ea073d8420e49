"""How much of a tensor a range may clip before it is too narrow."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.qparams import IntegerGrid

_SHARE, _INTEGERS = 0.01, 256


def largest_share(grid: IntegerGrid) -> float:
    """The share of a tensor's values that may lie outside of its range.

    1 % at 8 bits; fewer integers clip more where they round best. The least squared error of a
    normal distribution clips 0.01 %, 1 % and 9 % at 8, 4 and 2 bits; the bound is above them.

    Example:
        >>> [round(largest_share(IntegerGrid.activation(bits)), 3) for bits in (8, 4, 2)]
        [0.01, 0.063, 0.16]
    """
    integers = min(grid.qmax - grid.qmin + 1, _INTEGERS)
    share: float = _SHARE * (_INTEGERS / integers) ** (2 / 3)
    return share


def too_narrow(x: Tensor, found: Tensor, grid: IntegerGrid) -> Tensor:
    """Whether a range clips more than ``largest_share`` of a tensor.

    What is clipped gets no gradient, so that a network which grows beyond its ranges, as one does
    that is trained from random weights, stops learning there.

    Args:
        x: Values of any shape and dtype, at least one.
        found: ``(-low, high)``, shape ``(2,)``.
        grid: The integers in use. Values less than half a step outside are not clipped.

    Returns:
        A bool scalar on the device of ``x``.

    Example:
        >>> x = torch.arange(100.0)
        >>> too_narrow(x, torch.tensor([0.0, 98.0]), IntegerGrid(0, 255)).item()
        False
        >>> too_narrow(x, torch.tensor([0.0, 97.0]), IntegerGrid(0, 255)).item()
        True
    """
    x = x.detach()
    half = found.sum() / (2 * (grid.qmax - grid.qmin))
    outside = (x > found[1] + half) | (x < -found[0] - half)
    return outside.sum() > largest_share(grid) * x.numel()


def widened_if_narrow(found: Tensor, whole: Tensor, x: Tensor, grid: IntegerGrid) -> Tensor:
    """``found``, made as wide as the tensor's own range where it is ``too_narrow``.

    Args:
        found: ``(-low, high)`` that is used, shape ``(2,)``.
        whole: ``(-min, max)`` of the tensor; see ``batch_range``.
        x: The tensor.
        grid: The integers in use.
    """
    return torch.where(too_narrow(x, found, grid), torch.maximum(found, whole), found)
