"""Where the boxes of a plan stand: a row per call, chains straight, branches side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from lightning_qat.report.data import Arrow, Plan

WIDTH, HEIGHT = 200, 40
"""Size of a box."""
_ACROSS, _DOWN = WIDTH + 44, HEIGHT + 34
_MARGIN = 24


class Layout(NamedTuple):
    """Places on the page.

    Args:
        width: Of the drawing.
        height: Of the drawing.
        boxes: Left and top end of every box.
        paths: One SVG path per arrow.
    """

    width: int
    height: int
    boxes: tuple[tuple[int, int], ...]
    paths: tuple[str, ...]


def layout_of(plan: Plan) -> Layout:
    """Rows by the longest way from an input; columns so that long arrows pass by.

    Arrows over several rows are led along free places, one in each row that they pass.
    """
    count = len(plan.boxes)
    rows = [0] * count
    for arrow in sorted(plan.arrows, key=lambda a: a.end):
        rows[arrow.end] = max(rows[arrow.end], rows[arrow.start] + 1)
    columns = _columns(rows, plan.arrows)
    width = max(columns, default=0) + 1
    boxes = tuple(
        (_MARGIN + column * _ACROSS, _MARGIN + row * _DOWN)
        for row, column in zip(rows, columns, strict=True)
    )
    by_rows: dict[int, list[int]] = defaultdict(list)
    for box, row in enumerate(rows):
        by_rows[row].append(columns[box])
    lanes = _Lanes()
    paths = tuple(_path(a, rows, boxes, by_rows, lanes) for a in plan.arrows)
    return Layout(
        2 * _MARGIN + width * _ACROSS - (_ACROSS - WIDTH) + lanes.width,
        2 * _MARGIN + (max(rows, default=0) + 1) * _DOWN - (_DOWN - HEIGHT),
        boxes,
        paths,
    )


def _columns(rows: Sequence[int], arrows: Sequence[Arrow]) -> list[int]:
    """Each box below the first box that it reads and that no other stands below, else beside."""
    reads: dict[int, list[int]] = defaultdict(list)
    for arrow in arrows:
        reads[arrow.end].append(arrow.start)
    columns = [0] * len(rows)
    taken: dict[int, set[int]] = defaultdict(set)
    for box, row in enumerate(rows):
        wanted = min((columns[source] for source in reads[box]), default=0)
        column = wanted
        while column in taken[row]:
            column += 1
        columns[box] = column
        taken[row].add(column)
    return columns


class _Lanes:
    """Vertical lines for arrows that pass boxes, beside the columns."""

    def __init__(self) -> None:
        self._ends: list[int] = []
        self.width = 0

    def take(self, start: int, end: int) -> int:
        """The number of a lane that is free between two rows."""
        for lane, free_from in enumerate(self._ends):
            if free_from <= start:
                self._ends[lane] = end
                return lane
        self._ends.append(end)
        self.width = 14 * len(self._ends)
        return len(self._ends) - 1


def _path(
    arrow: Arrow,
    rows: Sequence[int],
    boxes: Sequence[tuple[int, int]],
    by_rows: dict[int, list[int]],
    lanes: _Lanes,
) -> str:
    """A curve from the lower edge of a box to the upper edge of another, past what is between."""
    (x0, y0), (x1, y1) = boxes[arrow.start], boxes[arrow.end]
    first, last = rows[arrow.start], rows[arrow.end]
    x0, y0, x1 = x0 + WIDTH // 2, y0 + HEIGHT, x1 + WIDTH // 2
    if last - first == 1:
        if x0 == x1:
            return f"M{x0} {y0}V{y1}"
        middle = (y0 + y1) // 2
        return f"M{x0} {y0}C{x0} {middle} {x1} {middle} {x1} {y1}"
    between = [column for row in range(first + 1, last) for column in by_rows[row]]
    right = max(between, default=0) + 1
    lane = lanes.take(first, last)
    x = max(_MARGIN + right * _ACROSS - (_ACROSS - WIDTH) + 8, x0, x1) + 8 + 6 * (lane % 4)
    return (
        f"M{x0} {y0}C{x0} {y0 + 20} {x} {y0 + 6} {x} {y0 + 34}"
        f"V{y1 - 34}C{x} {y1 - 6} {x1} {y1 - 20} {x1} {y1}"
    )
