"""How observed ranges should follow the data: every calibration, and what others do, on every task.

    python -m benchmarks.ranges                       # five tasks, 4 seeds
    python -m benchmarks.ranges --tasks text --bits 8

Networks, checkpoints and batches are those of ``benchmarks.accuracy``; inputs of layers have so
many bits, weights likewise with learned scales, and ranges follow until the end. The learning rate
is four times the task's, in nearly every row there better than once or twice. Given are points to
float, trained as long, with the standard error of the differences per seed.

*moving average* is the default: 1 % of every batch, but widened at once to what a batch would lose
to clipping, so that it is a maximum that decays. *average alone* is torch.ao's, *to three quarters*
is widened to that part of a batch. *decays by 10 %* is a maximum that decays ten times as fast,
*last 16* the range of the last 16 batches.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.accuracy.protocol import calibrate, train, with_error
from benchmarks.accuracy.runs import FLOAT, Run, checkpoint
from benchmarks.accuracy.task import score
from benchmarks.accuracy.tasks import TASKS
from lightning_qat import ActivationSpec, Recipe, WeightSpec, prepare
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS, Calibration
from lightning_qat.numerics.calibration.updates import moving_average, widened
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase

RATE = 4.0
Update = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def average_alone(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """``moving_average``, which the table of calibrations does not know as one that widens."""
    moving_average(low, high, batch, batches)


def to_three_quarters(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """``moving_average``, and at once to three quarters of a wider batch."""
    moving_average(low, high, batch, batches)
    widened(low, high, 0.75 * batch)


def decaying(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """A tenth of the way to the batch, and at once where that is wider."""
    low.lerp_(-batch[0], torch.where(batches == 0, 1.0, 0.1))
    high.lerp_(batch[1], torch.where(batches == 0, 1.0, 0.1))
    widened(low, high, batch)


def last_16() -> Update:
    """The widest ends of the last 16 batches."""
    seen: dict[int, deque[Tensor]] = {}

    def update(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
        # Ranges come alone, each in its own tensor, or all of them in one.
        kept = seen.setdefault(low.numel() if low.dim() else id(low), deque(maxlen=16))
        kept.append(batch.clone())
        ends = torch.stack([*kept]).amax(0)
        low.copy_(-ends[0])
        high.copy_(ends[1])

    return update


OTHERS: Mapping[str, Callable[[], Update]] = {
    "average alone": lambda: average_alone,
    "to three quarters": lambda: to_three_quarters,
    "decays by 10 %": lambda: decaying,
    "last 16": last_16,
}


@contextlib.contextmanager
def following(row: str) -> Iterator[str]:
    """The calibration of a row; what is none of ours stands in for the moving average."""
    if row not in OTHERS:
        yield row
        return
    with patch.dict(CALIBRATIONS, moving_average=Calibration(OTHERS[row]())):
        yield "moving_average"


def trained(name: str, row: str, bits: int, seed: int, folder: Path) -> tuple[float, float]:
    """The score of one network, and the seconds of a processor that it trained."""
    torch.set_num_threads(1)
    task = TASKS[name]
    data = task.data(seed)
    model = checkpoint(task, data, Run(name, FLOAT, "", RATE, seed), folder)
    torch.manual_seed(seed)
    with following(row) as calibration:
        if row != FLOAT:
            learns = row == "learned"
            recipe = Recipe(
                weight=WeightSpec(bits, quantizer="learned"),
                activation=ActivationSpec(bits, quantizer="learned", calibration="mse")
                if learns
                else ActivationSpec(bits, calibration=calibration),  # type: ignore[arg-type]
                joins=False,
                outputs=False,
            )
            prepare(model, recipe, data.x[:2])
            calibrate(model, data.x, seed)
            apply_phase(model, Phase("quantize", not learns, True, False))
        start = time.process_time()
        train(task, model, data, task.epochs, RATE * task.rate, seed)
        return score(task, model, data), time.process_time() - start


def main() -> None:
    """Print a table: rows of calibrations, columns of tasks."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.ranges",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rows = [*CALIBRATIONS, *OTHERS, "learned"]
    tasks = [name for name in TASKS if name != "mnist1d_gru"]
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=tasks)
    parser.add_argument("--rows", nargs="+", choices=rows, default=rows, metavar="ROW",
                        help=f"of {', '.join(rows)}; default: all")  # fmt: skip
    parser.add_argument("--bits", type=int, default=4, help="default: 4")
    parser.add_argument("--seeds", type=int, default=4, help="networks per number (default: 4)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--folder", type=Path, default=Path("accuracy"), help="keeps checkpoints")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    table = Table(title=f"{options.bits} bits, {options.seeds} seeds", box=box.MARKDOWN)
    table.add_column("activations", no_wrap=True)
    columns: list[list[str]] = []
    times: dict[str, list[float]] = {row: [] for row in options.rows}
    with ProcessPoolExecutor(options.jobs) as pool:
        for name in options.tasks:
            # Float first: it makes the checkpoints.
            runs = [(row, seed) for row in (FLOAT, *options.rows) for seed in range(options.seeds)]
            begun = [
                pool.submit(trained, name, row, options.bits, seed, options.folder)
                for row, seed in runs
            ]
            results = [one.result() for one in track(begun, name)]
            found = dict(zip(runs, results, strict=True))
            gaps: dict[str, list[float]] = {}
            for row in options.rows:
                pairs = [(found[row, seed], found[FLOAT, seed]) for seed in range(options.seeds)]
                gaps[row] = [ours[0] - theirs[0] for ours, theirs in pairs]
                ratios = [ours[1] / theirs[1] for ours, theirs in pairs]
                times[row].append(statistics.median(ratios))  # imports count in a first run
            table.add_column(TASKS[name].title, no_wrap=True)
            columns.append([with_error(gaps[row], "+") for row in options.rows])
    table.add_column("time", no_wrap=True)
    for row, *cells in zip(options.rows, *columns, strict=True):
        table.add_row(row, *cells, f"{statistics.mean(times[row]):.2f}")
    Console(width=160).print(table)  # Markdown must not be cut


if __name__ == "__main__":
    main()
