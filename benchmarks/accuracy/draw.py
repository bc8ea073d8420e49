"""A drawing of the tables: points below float over bits, a panel for each task."""

# pyright: reportMissingImports=false

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path

from benchmarks.accuracy.table import Row, gaps
from benchmarks.accuracy.task import Task


def draw(tasks: Mapping[Task, list[Row]], file: Path) -> None:
    """Write an SVG; bars are means, lines on them one standard error."""
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    figure, axes = pyplot.subplots(
        len(tasks), 1, figsize=(8, 2.6 * len(tasks)), squeeze=False, layout="constrained"
    )
    quantized = {task: [row for row in rows if row.bits] for task, rows in tasks.items()}
    titles = list(dict.fromkeys(row.title for rows in quantized.values() for row in rows))
    colors = {title: f"C{number}" for number, title in enumerate(titles)}
    for axis, (task, rows) in zip(axes[:, 0], tasks.items(), strict=True):
        widths = list(dict.fromkeys(row.bits for row in quantized[task]))
        for place, bits in enumerate(widths):
            at = [row for row in quantized[task] if row.bits == bits]
            for number, row in enumerate(at):
                values = gaps(row, rows[0])
                axis.bar(
                    place + (number + 0.5) * 0.8 / len(at) - 0.4,
                    statistics.mean(values),
                    0.75 / len(at),
                    color=colors[row.title],
                    yerr=statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None,
                )
        axis.set_xticks(range(len(widths)), widths)
        axis.axhline(0.0, color="black", linewidth=0.8)
        axis.set_ylabel("points to float")
        axis.set_title(f"{task.title} ({task.measure})", fontsize=10)
    bars = [Rectangle((0, 0), 1, 1, color=colors[title]) for title in titles]
    figure.legend(bars, titles, loc="outside lower center", ncols=3, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
