"""Quantization from random weights: the loss it ends with, against float, for every calibration.

    python -m benchmarks.from_nothing                       # every task, 3 seeds
    python -m benchmarks.from_nothing --tasks mnist1d --seeds 8 --rows learned

The networks of ``benchmarks.accuracy`` train from their random weights as long and as fast as they
do in float there. The quantized ones have the default recipe but for what the row says, and
quantize from the second batch on: no schedule, no checkpoint. Given are the loss on the test data
and the score, as means over seeds, and how far from float's they are, with the standard error of
the differences per seed; a range that collapses or lags shows here. The second row tells what
chance does: float again, of the same weights, with batches in another order.
``benchmarks.sequence --from-nothing`` does the same with five families of layers on the
adding problem.
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

from benchmarks.accuracy.protocol import train, with_error
from benchmarks.accuracy.runs import AGAIN, FLOAT
from benchmarks.accuracy.task import Data, Task, test_outputs
from benchmarks.accuracy.tasks import TASKS
from lightning_qat import ActivationSpec, Recipe, WeightSpec, prepare
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS


def recipes() -> Mapping[str, Recipe | None]:
    """The rows of a table."""
    observed = {
        name: Recipe.from_dict({"activation": {"calibration": name}}) for name in CALIBRATIONS
    }
    learned = {
        "learned": Recipe(activation=ActivationSpec(quantizer="learned")),
        "learned weights": Recipe(weight=WeightSpec(quantizer="learned")),
    }
    return {FLOAT: None, AGAIN: None, **observed, **learned}


def trained(name: str, row: str, seed: int) -> tuple[float, float]:
    """Loss and score on the test data of one network, trained from random weights."""
    torch.set_num_threads(1)
    task: Task = TASKS[name]
    data: Data = task.data(seed)
    torch.manual_seed(seed)
    model = task.network()
    recipe = recipes()[row]
    if recipe is not None:
        prepare(model, recipe, data.x[:2])
    order = seed + 1000 if row == AGAIN else seed
    train(task, model, data, task.float_epochs, task.float_rate, order)
    outputs = test_outputs(model, data)
    return float(task.loss(outputs, data.y_test)), task.score(outputs, data.y_test)


def main() -> None:
    """Print a table."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.from_nothing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=recipes(), default=list(recipes()))
    parser.add_argument("--seeds", type=int, default=3, help="networks per row (default: 3)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    rows = [FLOAT, *(row for row in recipes() if row in options.rows)]
    for name in options.tasks:
        runs = [(row, seed) for row in rows for seed in range(options.seeds)]
        with ProcessPoolExecutor(options.jobs) as pool:
            names, of_rows, seeds = zip(*((name, *run) for run in runs), strict=True)
            results = pool.map(trained, names, of_rows, seeds)
            found = dict(zip(runs, track(results, name, total=len(runs)), strict=True))
        Console(width=140).print(_table(name, rows, options.seeds, found))  # must not be cut


def _table(
    name: str, rows: list[str], seeds: int, found: Mapping[tuple[str, int], tuple[float, float]]
) -> Table:
    task: Task = TASKS[name]
    table = Table(title=f"{task.title}, {seeds} seeds", box=box.MARKDOWN)
    for column in ("activations", "loss", "above float, %", task.measure, "to float"):
        table.add_column(column, no_wrap=True)
    float_loss = statistics.mean(found[FLOAT, seed][0] for seed in range(seeds))
    for row in rows:
        pairs = [(found[row, seed], found[FLOAT, seed]) for seed in range(seeds)]
        above = [100 * (ours[0] - theirs[0]) / float_loss for ours, theirs in pairs]
        gained = [ours[1] - theirs[1] for ours, theirs in pairs]
        differences = with_error(above, "+"), with_error(gained, "+")
        table.add_row(
            row,
            f"{statistics.mean(ours[0] for ours, _ in pairs):.4f}",
            "" if row == FLOAT else differences[0],
            f"{statistics.mean(ours[1] for ours, _ in pairs):.2f}",
            "" if row == FLOAT else differences[1],
        )
    return table


if __name__ == "__main__":
    main()
