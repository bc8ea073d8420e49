"""Whether a series grows, by a regression that spikes do not move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCKS = 100
"""A series is cut into so many blocks, whose medians are compared in pairs."""


@dataclass(frozen=True)
class Trend:
    """A line through a series.

    Args:
        level: The median of the series.
        change: From the first value to the last, along the line; in the unit of the values.
        low: Lower end of the 95 % confidence interval of ``change``.
        high: Upper end.
    """

    level: float
    change: float
    low: float
    high: float

    @property
    def none(self) -> bool:
        """No change stays a possibility."""
        return self.low <= 0 <= self.high

    @property
    def relative(self) -> float:
        """The change as a share of the level."""
        return self.change / self.level


def trend(values: Sequence[float]) -> Trend:
    """The Theil-Sen line: the median of the slopes of all pairs of values.

    Up to 29 % of the values may be anything. The interval is Sen's (1968), from the variance of
    Kendall's statistic.

    Args:
        values: Measured at equal distances; at least 10.

    Example:
        >>> found = trend([1.0, 1.5, 2.0, 90.0, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5])
        >>> found.change, found.none
        (4.5, False)
    """
    if len(values) < 10:
        raise ValueError(f"A trend needs 10 values or more; got {len(values)}.")
    blocks = np.array_split(np.asarray(values, float), min(BLOCKS, len(values)))
    medians = np.array([np.median(block) for block in blocks])
    count = len(medians)
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((medians[second] - medians[first]) / (second - first))
    width = 1.96 * np.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low, high = (round((len(slopes) + sign * width) / 2) for sign in (-1, 1))
    ends = slopes[max(low - 1, 0)], slopes[min(high, len(slopes) - 1)]
    length = count - 1
    return Trend(
        float(np.median(values)),
        float(np.median(slopes)) * length,
        float(ends[0]) * length,
        float(ends[1]) * length,
    )
