"""From numbers to the coordinates of small drawings; the templates write the SVG around them.

A library's drawings are 10 to 30 kB each, and a page has two for every layer: these are below 1 kB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from lightning_qat.report.data import Histogram, Training

WIDTH, HEIGHT = 256, 72
"""Of a histogram, in its own units."""
_FEW = 40
"""So many integers of a grid are drawn one by one; of more every so many."""


class HistogramChart(NamedTuple):
    """The coordinates of a histogram.

    Args:
        inside: Outline of the bars that lie on the grid.
        outside: Outline of those that do not; empty: there are none.
        ticks: The grid's integers along the lower edge.
        every: How many integers one tick counts.
        grid: Left and right end of the grid.
        zero: Where real zero is; ``None``: outside the drawing.
    """

    inside: str
    outside: str
    ticks: str
    every: int
    grid: tuple[float, float]
    zero: float | None


def histogram_chart(histogram: Histogram) -> HistogramChart:
    """Bars as high as the square root of their counts, so that tails are seen."""
    span = (histogram.high - histogram.low) or 1.0

    def across(value: float) -> float:
        return round((value - histogram.low) / span * WIDTH, 1)

    bins = len(histogram.counts)
    heights = [math.sqrt(count / max(1, *histogram.counts)) for count in histogram.counts]
    edges = [histogram.low + span * i / bins for i in range(bins + 1)]
    reach = histogram.step / 2
    on_grid = [
        right > histogram.grid_low - reach and left < histogram.grid_high + reach
        for left, right in pairwise(edges)
    ]
    levels = round((histogram.grid_high - histogram.grid_low) / histogram.step) + 1
    every = 1
    while levels / every > _FEW:
        every *= 2
    marks = (histogram.grid_low + histogram.step * n for n in range(0, levels, every))
    zero = across(histogram.zero)
    return HistogramChart(
        _outline([h if on else 0.0 for h, on in zip(heights, on_grid, strict=True)]),
        _outline([0.0 if on else h for h, on in zip(heights, on_grid, strict=True)]),
        "".join(f"M{_short(across(x))} {HEIGHT}v5" for x in marks),
        every,
        (across(histogram.grid_low), across(histogram.grid_high)),
        zero if 0 <= zero <= WIDTH else None,
    )


def _outline(heights: Sequence[float]) -> str:
    """One closed path around each row of bars."""
    width, path, before = WIDTH / len(heights), "", 0
    for number, height in enumerate(heights):
        top = max(1, round(height * HEIGHT)) if height else 0
        if top and not before:
            path += f"M{_short(number * width)} {HEIGHT}"
        if top != before:
            path += f"V{HEIGHT - top}"
        if top:
            path += f"H{_short((number + 1) * width)}"
        before = top
    return path + (f"V{HEIGHT}" if before else "")


class Band(NamedTuple):
    """One phase behind the loss curve: its name, where it begins and how wide it is."""

    name: str
    step: int
    left: float
    width: float


class LossChart(NamedTuple):
    """The coordinates of the loss curve.

    Args:
        path: The curve.
        bands: The phases.
        rows: Losses along the left edge, with their heights.
        columns: Steps along the lower edge, with their places.
        logarithmic: Heights are logarithms.
    """

    path: str
    bands: tuple[Band, ...]
    rows: tuple[tuple[str, float], ...]
    columns: tuple[tuple[int, float], ...]
    logarithmic: bool


LOSS_WIDTH, LOSS_HEIGHT = 720, 200


def loss_chart(training: Training) -> LossChart | None:
    """The curve over the phases; ``None`` where fewer than two losses are known."""
    points = [(step, loss) for step, loss in training.loss if math.isfinite(loss)]
    if len(points) < 2:
        return None
    first, last = points[0][0], max(step for step, _ in points)
    losses = [loss for _, loss in points]
    low, high = min(losses), max(losses)
    logarithmic = low > 0 and high / low > 50

    def scaled(loss: float) -> float:
        return math.log10(loss) if logarithmic else loss

    bottom, top = scaled(low), scaled(high)
    span = (top - bottom) or 1.0

    def across(step: float) -> float:
        return round((step - first) / max(1, last - first) * LOSS_WIDTH, 1)

    def down(loss: float) -> float:
        return round(LOSS_HEIGHT - 8 - (scaled(loss) - bottom) / span * (LOSS_HEIGHT - 16), 1)

    values = [bottom + span * n / 4 for n in range(5)]
    rows = [10**value if logarithmic else value for value in values]
    steps = [round(first + (last - first) * n / 4) for n in range(5)]
    return LossChart(
        "M" + "L".join(f"{_short(across(step))} {_short(down(loss))}" for step, loss in points),
        tuple(_bands(training, first, last, across)),
        tuple((f"{row:.3g}", down(row)) for row in rows),
        tuple((step, across(step)) for step in dict.fromkeys(steps)),
        logarithmic,
    )


def _bands(
    training: Training, first: int, last: int, across: Callable[[float], float]
) -> Iterator[Band]:
    ends = [*(step for step, _ in training.phases[1:]), last]
    for (step, name), end in zip(training.phases, ends, strict=False):
        left, right = across(max(first, min(step, last))), across(max(first, min(end, last)))
        yield Band(name, step, left, round(right - left, 1))


def _short(value: float) -> str:
    """A coordinate without a superfluous ``.0``."""
    return f"{value:.1f}".removesuffix(".0")
