"""Single measurements, and the file that keeps them, so that a command goes on where it stopped."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from benchmarks.accuracy.protocol import train, trained_in_float
from benchmarks.accuracy.task import Data, Task, score
from benchmarks.accuracy.tasks import TASKS
from benchmarks.accuracy.tools import named, tools

FLOAT = "float"
AGAIN = "float, other batches"
"""What chance does: the float network with batches in another order."""


@dataclass(frozen=True)
class Run:
    """What is measured.

    Args:
        task: Its name.
        tool: Its name; ``FLOAT`` is the float network, trained as long as the others; ``AGAIN``.
        bits: ``W4A8``; empty with float.
        rate: The learning rate, over the task's.
        seed: Of data, weights and batches.
    """

    task: str
    tool: str
    bits: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """Scores in percent: of the checkpoint or what was calibrated from it, and after training."""

    untrained: float
    trained: float


def measure(run: Run, folder: Path) -> Result:
    """Train one network, from the checkpoint in the folder if it is there."""
    warnings.simplefilter("ignore")  # the tools' own
    torch.set_num_threads(1)
    task = TASKS[run.task]
    data = task.data(run.seed)
    model: nn.Module = checkpoint(task, data, run, folder)
    torch.manual_seed(run.seed)
    rate = run.rate * task.rate
    if run.tool in (FLOAT, AGAIN):
        before = score(task, model, data)
        order = run.seed if run.tool == FLOAT else run.seed + 1000
        train(task, model, data, task.epochs, rate, order)
        return Result(before, score(task, model, data))
    tool = dict(tools())[run.tool]
    bits = next(bits for bits in tool.points if named(bits) == run.bits)
    model = tool.prepare(model, data.x, run.seed, bits)
    calibrated = copy.deepcopy(model)
    tool.calibrated(calibrated, data.x, run.seed)
    before = score(task, calibrated, data)
    train(task, model, data, task.epochs, rate, run.seed, tool.freeze)
    return Result(before, score(task, model, data))


def checkpoint(task: Task, data: Data, run: Run, folder: Path) -> nn.Module:
    """The float network of a seed: from the folder, else trained and kept there."""
    file = folder / f"{run.task}_{run.seed}.pt"
    if file.exists():
        model = task.network()
        model.load_state_dict(torch.load(file))
        return model
    model = trained_in_float(task, data, run.seed)
    own = folder / f"{run.task}_{run.seed}_{run.tool}_{run.bits}_{run.rate}.part"
    torch.save(model.state_dict(), own)
    own.replace(file)
    return model


class Results:
    """The lines of a file: what was measured before, and what comes to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._file = folder, folder / "results.jsonl"
        self._known: dict[Run, Result] = {}
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                read: dict[str, Any] = json.loads(line)
                self._known[Run(**read["run"])] = Result(**read["result"])

    def __getitem__(self, run: Run) -> Result:
        return self._known[run]

    def complete(self, runs: Sequence[Run], jobs: int, what: str) -> None:
        """Measure what is missing, in so many processes."""
        missing = [run for run in runs if run not in self._known]
        # Of a task and a seed the first run makes the checkpoint that the others read.
        missing.sort(key=lambda run: (run.tool != FLOAT, run.seed))
        with (
            ProcessPoolExecutor(jobs) as pool,
            self._file.open("a", encoding="utf-8") as file,
        ):
            begun = {pool.submit(measure, run, self.folder): run for run in missing}
            for done in track(as_completed(begun), what, total=len(begun)):
                run, result = begun[done], done.result()
                self._known[run] = result
                file.write(json.dumps({"run": asdict(run), "result": asdict(result)}) + "\n")
                file.flush()
