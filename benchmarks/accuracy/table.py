"""The table of a task."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.table import Table

from benchmarks.accuracy.protocol import with_error
from benchmarks.accuracy.runs import Result
from benchmarks.accuracy.task import Task


@dataclass(frozen=True)
class Row:
    """One tool at one width.

    Args:
        title: The tool.
        bits: Empty with float.
        rate: The learning rate that was chosen, over the task's.
        results: Of the seeds, in their order.
    """

    title: str
    bits: str
    rate: float
    results: list[Result]


def gaps(row: Row, reference: Row) -> list[float]:
    """Points above the float network of the same seed, after training."""
    pairs = zip(row.results, reference.results, strict=True)
    return [mine.trained - other.trained for mine, other in pairs]


def table(task: Task, rows: list[Row]) -> Table:
    """In Markdown; the first row is that of float."""
    title = f"{task.title}: {task.measure}, {len(rows[0].results)} seeds"
    made = Table(title=title, box=box.MARKDOWN)
    for column in ("bits", "tool", "calibrated, %", "trained, %", "to float", "rate"):
        made.add_column(column, no_wrap=True)
    # The widths in the order of the first tool, at each of them the best one first.
    places = {row.bits: place for place, row in reversed([*enumerate(rows)])}
    order = sorted(
        rows[1:], key=lambda row: (places[row.bits], -sum(result.trained for result in row.results))
    )
    for row in (rows[0], *order):
        made.add_row(
            row.bits,
            row.title,
            with_error([result.untrained for result in row.results]),
            with_error([result.trained for result in row.results]),
            "" if row is rows[0] else with_error(gaps(row, rows[0]), "+"),
            f"{row.rate * task.rate:g}",
        )
    return made
