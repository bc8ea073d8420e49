"""Accuracy after quantization-aware training, of us and of others, on several tasks.

    python -m benchmarks.accuracy                              # every task, 10 seeds: hours
    python -m benchmarks.accuracy --tasks digits mnist1d --seeds 3
    python -m benchmarks.accuracy --tools learned Brevitas --folder accuracy
    python -m benchmarks.accuracy --plot docs/images/accuracy.svg

Everybody starts from the float checkpoint of each seed, trains as many further epochs of Adam on
the same batches, and quantizes inputs and weights of the layers, the first and the last ones too.
The learning rate is chosen, for each task, tool and width and for float alike, out of four on
seeds that count for nothing else. Given are means over seeds with their standard errors: the score
in percent, and its difference to the float network of the same seed, trained as long. *Calibrated*
networks were not trained; ours have their biases corrected. `whole` also quantizes what operations
outside of layers read. *float, other batches* is float with batches in another order: what chance
does.

The folder keeps every result: a command that was stopped goes on, and other tools can be added.
Other tools that are installed are measured as well (benchmarks/peers.py).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rich.console import Console

from benchmarks.accuracy.draw import draw
from benchmarks.accuracy.runs import AGAIN, FLOAT, Results, Run
from benchmarks.accuracy.table import Row, table
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tools import named, tools

RATES = (1.0, 2.0, 4.0, 8.0)
"""Learning rates over that of the task."""
HELD_OUT = 100
"""The first of the seeds that choose the rate."""


def chosen_rates(results: Results, task: str, variants: list[tuple[str, str]]) -> dict[str, float]:
    """The rate with the best mean of the seeds held out, by ``tool bits``."""
    best = {}
    seeds = _held_out(task)
    for tool, bits in variants:
        means = {
            rate: statistics.mean(
                results[Run(task, tool, bits, rate, seed)].trained for seed in seeds
            )
            for rate in RATES
        }
        best[f"{tool} {bits}"] = max(means, key=lambda rate: means[rate])
    return best


def _held_out(task: str) -> range:
    return range(HELD_OUT, HELD_OUT + TASKS[task].held_out)


def rows_of(results: Results, task: str, chosen: list[str], seeds: int, jobs: int) -> list[Row]:
    """Measure one task; a row for each tool and width, float first."""
    found = dict(tools())
    variants = [(FLOAT, "")]
    for name in chosen:
        if found[name].tasks is None or task in found[name].tasks:  # type: ignore[operator]
            variants += [(name, named(bits)) for bits in found[name].points]
    tried = [
        Run(task, tool, bits, rate, seed)
        for tool, bits in variants
        for rate in RATES
        for seed in _held_out(task)
    ]
    results.complete(tried, jobs, f"{task}: learning rates")
    best = chosen_rates(results, task, variants)
    runs = {
        (tool, bits): [Run(task, tool, bits, best[f"{tool} {bits}"], seed) for seed in range(seeds)]
        for tool, bits in variants
    }
    runs[AGAIN, ""] = [Run(task, AGAIN, "", best[f"{FLOAT} "], seed) for seed in range(seeds)]
    results.complete([run for each in runs.values() for run in each], jobs, task)
    return [
        Row(
            found[tool].title if tool in found else tool,
            bits,
            each[0].rate,
            [results[run] for run in each],
        )
        for (tool, bits), each in runs.items()
    ]


def main() -> None:
    """Measure, and print a table for every task."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [name for name, _ in tools()]
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--tools", nargs="+", choices=known, default=known, metavar="TOOL",
                        help=f"of {', '.join(known)}; default: all")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=10, help="networks per row (default: 10)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--folder", type=Path, default=Path("accuracy"), help="keeps results")
    parser.add_argument("--plot", type=Path, help="an SVG to draw the tables to")
    options = parser.parse_args()
    results, drawn = Results(options.folder), {}
    for name in options.tasks:
        rows = rows_of(results, name, options.tools, options.seeds, options.jobs)
        drawn[TASKS[name]] = rows
        Console(width=120).print(table(TASKS[name], rows))  # Markdown must not be cut
    if options.plot:
        draw(drawn, options.plot)


if __name__ == "__main__":
    main()
