"""Quantization from random weights: the loss it ends with, against float, for every calibration.

    python -m benchmarks.from_nothing                       # every task, 3 seeds
    python -m benchmarks.from_nothing --tasks mnist1d --seeds 5

The networks of ``benchmarks.accuracy`` train from their random weights as long and as fast as they
do in float there. The quantized ones have the default recipe but for what the row says, and
quantize from the second batch on: no schedule, no checkpoint. Given is the loss on the test data,
its mean over seeds, and how far above float it is; a range that collapses or lags shows here.
``benchmarks/sequence.py --from-nothing`` does the same with LSTM and GRU on the adding problem.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.accuracy.protocol import train
from benchmarks.accuracy.runs import FLOAT
from benchmarks.accuracy.task import Data, Task, test_outputs
from benchmarks.accuracy.tasks import TASKS
from lightning_qat import ActivationSpec, Recipe, prepare
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS


def recipes() -> Mapping[str, Recipe | None]:
    """The rows of a table."""
    observed = {
        name: Recipe.from_dict({"activation": {"calibration": name}}) for name in CALIBRATIONS
    }
    learned = Recipe(activation=ActivationSpec(quantizer="learned"))
    return {FLOAT: None, **observed, "learned": learned}


def loss_of(name: str, row: str, seed: int) -> float:
    """The loss on the test data of one network, trained from random weights."""
    torch.set_num_threads(1)
    task: Task = TASKS[name]
    data: Data = task.data(seed)
    torch.manual_seed(seed)
    model = task.network()
    recipe = recipes()[row]
    if recipe is not None:
        prepare(model, recipe, data.x[:2])
    train(task, model, data, task.float_epochs, task.float_rate, seed)
    return float(task.loss(test_outputs(model, data), data.y_test))


def main() -> None:
    """Print a table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.from_nothing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3, help="networks per row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    for name in options.tasks:
        table = Table(title=f"{TASKS[name].title}, {options.seeds} seeds", box=box.MARKDOWN)
        for column in ("activations", "loss", "above float"):
            table.add_column(column, no_wrap=True)
        runs = [(row, seed) for row in recipes() for seed in range(options.seeds)]
        with ProcessPoolExecutor(options.jobs) as pool:
            names, rows, seeds = zip(*((name, *run) for run in runs), strict=True)
            losses = [*track(pool.map(loss_of, names, rows, seeds), name, total=len(runs))]
        found: dict[str, list[float]] = {}
        for (row, _), loss in zip(runs, losses, strict=True):
            found.setdefault(row, []).append(loss)
        least = statistics.mean(found[FLOAT])
        for row, values in found.items():
            mean = statistics.mean(values)
            above = "" if row == FLOAT else f"{mean / least - 1:+.1%}"
            table.add_row(row, f"{mean:.4f}", above)
        Console(width=120).print(table)  # Markdown must not be cut


if __name__ == "__main__":
    main()
