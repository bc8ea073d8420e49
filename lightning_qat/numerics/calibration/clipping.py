"""How much of a tensor a range may clip before it is too narrow."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.qparams import IntegerGrid

_MOST_INTEGERS = 256


def largest_share(grid: IntegerGrid) -> float:
    """The share of a tensor's values that may lie outside of its range.

    As many as an integer holds on average: ``1 / integers``, with no more than 256 integers. Fewer
    integers clip more where they round best: the least squared error of a normal distribution clips
    0.01 %, 1 % and 9 % at 8, 4 and 2 bits, below 0.4, 6 and 25.

    Example:
        >>> [largest_share(IntegerGrid.activation(bits)) for bits in (8, 4, 2)]
        [0.00390625, 0.0625, 0.25]
    """
    return 1 / min(grid.qmax - grid.qmin + 1, _MOST_INTEGERS)


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
        >>> x = torch.arange(1000.0)
        >>> too_narrow(x, torch.tensor([0.0, 995.0]), IntegerGrid(0, 255)).item()
        False
        >>> too_narrow(x, torch.tensor([0.0, 994.0]), IntegerGrid(0, 255)).item()
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


def outgrown(
    low: Tensor, high: Tensor, scale: Tensor, values: Tensor | int, grid: IntegerGrid
) -> Tensor:
    r"""Whether weights have outgrown a learned scale: one of them is clipped for too much.

    A weight that lies :math:`d` steps outside loses :math:`d^2` to clipping. Steps so long that
    the last integer :math:`q` reaches the largest weight, at :math:`m` now, would lose
    :math:`((m / q)^2 - 1) n / 12` more to the rounding of all :math:`n` weights. Few integers may
    clip more: of 100 weights one that is up to 1.4 times the range at 4 bits, and any at 2. Less
    than a step outside is left to gradients, as it is where the least squared error has found a
    scale.

    Args:
        low: The smallest weight of each channel, float32.
        high: The largest, the shape of ``low``.
        scale: The learned scales, the shape of ``low``.
        values: How many weights share each scale.
        grid: The integers in use.

    Returns:
        Bools in the shape of ``low``.

    Example:
        >>> low, high = torch.tensor([-1.27, -1.0, -1.0]), torch.tensor([1.0, 1.274, 1.29])
        >>> outgrown(low, high, torch.tensor(0.01), 64, IntegerGrid.weight(8))
        tensor([False, False,  True])
    """
    outside = torch.maximum(high / scale - grid.qmax, grid.qmin - low / scale)
    longer = torch.maximum(-low, high) / (scale * grid.qmax)
    return (outside > 1) & (outside.square() > (longer.square() - 1) * (values / 12))
