"""A long fit through all phases, with validation and checkpoints; what its memory and time do."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat import QATCallback, Schedule
from reliability.soak.memory import live_tensors, resident
from reliability.soak.trend import BLOCKS, Trend, trend

EVERY = 100
"""Steps between two looks at the memory."""


@dataclass(frozen=True)
class Run:
    """What a fit does.

    Args:
        steps: Optimizer steps.
        settle: Steps before which nothing is judged: every phase has begun by then.
        processes: 2 trains with DDP, gloo, on the CPU.
        compiled: The network is compiled.
        bar: The progress bar is shown.
        qat: ``False`` trains in float, for comparison.
    """

    steps: int = 10_000
    settle: int = 1_000
    processes: int = 1
    compiled: bool = False
    bar: bool = False
    qat: bool = True


@dataclass
class Seen:
    """What a fit showed, of its first process.

    Args:
        seconds: CPU time of each step, from the end of the one before it; those with a validation
            are left out.
        control: CPU time of the same work at every tenth step: a machine that others use as well
            is faster and slower by the minute.
        calls: Function calls in Python of one step in ``EVERY``, which no load changes.
        memory: Resident bytes, every ``EVERY`` steps.
        tensors: Live tensors then.
        tensor_bytes: Their bytes.
        phases: The step at which each phase began, by its number (``Phase.index``).
    """

    seconds: list[float] = field(default_factory=list)
    control: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    tensors: list[int] = field(default_factory=list)
    tensor_bytes: list[int] = field(default_factory=list)
    phases: dict[str, int] = field(default_factory=dict)

    def growth(self, run: Run) -> float:
        """Resident memory at the end, as a share more than when everything had settled.

        Of both the median of five looks: the allocator goes up and down by pages.
        """
        after = self.memory[run.settle // EVERY :]
        ends = [sorted(part)[len(part) // 2] for part in (after[:5], after[-5:])]
        return ends[1] / ends[0] - 1

    def step_time(self, run: Run) -> Trend:
        """How the time of a step changed after everything had settled, in units of the control."""
        start = run.settle / run.steps
        settled = [times[int(start * len(times)) :] for times in (self.seconds, self.control)]
        blocks = min(BLOCKS, len(settled[1]))
        parts = [np.array_split(np.asarray(times), blocks) for times in settled]
        return trend([float(np.median(s) / np.median(c)) for s, c in zip(*parts, strict=True)])


class Batches(IterableDataset[tuple[Tensor, Tensor]]):
    """Random batches without end, so that a fit is one epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            x = torch.randn(8, 3, 8, 8, generator=generator)
            yield x, x.sum((2, 3)).argmax(1)


class Net(L.LightningModule):
    """Convolutions with batch norms, a sum of two branches, a linear layer."""

    def __init__(self, compiled: bool) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 3, 8, 8)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)
        if compiled:
            self.stem.compile()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 3) of images (batch, 3, 8, 8)."""
        stem = self.stem(x)
        logits: Tensor = self.head(F.relu(self.branch(stem) + stem).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross entropy, logged."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        """Cross entropy, logged."""
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Watch(L.Callback):
    """Fills in a ``Seen``."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.control = Control()
        self.before: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the calls of a step now and then; none that is logged or validated."""
        if trainer.global_step % EVERY == EVERY // 4:
            self.seen.calls.append(0)
            sys.setprofile(self._count)

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            self.seen.calls[-1] += 1

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Note the step's time, and every so often the memory."""
        counted = sys.getprofile() is not None
        sys.setprofile(None)
        now = time.process_time()
        if self.before is not None and not counted:
            self.seen.seconds.append(now - self.before)
        if trainer.global_step % 10 == 0:
            self.seen.control.append(self.control.seconds())
        if trainer.global_step % EVERY == 0:
            count, size = live_tensors()
            self.seen.tensors.append(count)
            self.seen.tensor_bytes.append(size)
            self.seen.memory.append(resident())
        self.before = time.process_time()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The next step does not include the validation."""
        self.before = None


class Control:
    """The same work whenever it is called: three steps of a float network, without a Trainer."""

    def __init__(self) -> None:
        self.net = Net(compiled=False)
        self.x, self.y = torch.ones(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)
        self.optimizer = torch.optim.SGD(self.net.parameters(), 1e-9, momentum=0.9)

    def seconds(self) -> float:
        """CPU time that it takes now."""
        begin = time.process_time()
        for _ in range(3):
            self.optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.net(self.x), self.y))
            self.optimizer.step()
        return time.process_time() - begin


def fit(run: Run, exporters: tuple[str, ...] = ("fake_quant_onnx",)) -> Seen:
    """Train, validate, save and export; what was seen.

    Raises:
        RuntimeError: A phase did not begin.
    """
    L.seed_everything(0, verbose=False)
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        qat = None
        if run.qat:
            qat = QATCallback(
                "int8",
                schedule=Schedule(
                    calibration_batches=run.settle // 10,
                    freeze_observers=run.settle // 2,
                    freeze_batchnorm=run.settle * 3 // 4,
                    interval="step",
                ),
                exporters=list(exporters),
                export_dir=Path(folder) / "export",
                log=50,
            )
        logger = CSVLogger(folder)
        saving = ModelCheckpoint(Path(folder) / "saved", every_n_train_steps=250, save_top_k=1)
        callbacks: list[Any] = [saving, Watch(seen), *([qat] if qat else [])]
        trainer = L.Trainer(
            max_steps=run.steps,
            val_check_interval=250,
            limit_val_batches=2,
            callbacks=callbacks,
            logger=logger,
            enable_progress_bar=run.bar,
            enable_model_summary=False,
            accelerator="cpu",
            devices=run.processes,
            strategy="ddp" if run.processes > 1 else "auto",
            log_every_n_steps=50,
        )
        training, validation = (DataLoader(Batches(), batch_size=None) for _ in range(2))
        trainer.fit(Net(run.compiled), training, validation)
        if run.qat and trainer.is_global_zero:
            seen.phases.update(_phases(Path(logger.log_dir) / "metrics.csv"))
        if not trainer.is_global_zero:
            sys.exit()
    return seen


def _phases(log: Path) -> Iterator[tuple[str, int]]:
    """Each phase's number and its first step, as they were logged.

    Raises:
        RuntimeError: A phase did not begin.
    """
    found = dict[str, int]()
    with log.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row.get("qat/phase"):
                found.setdefault(row["qat/phase"][0], int(row["step"]))
    if sorted(found) != ["1", "2", "3", "4"]:
        raise RuntimeError(f"The fit must go through the phases 1 to 4; it went through {found}.")
    yield from found.items()


def fit_apart(run: Run) -> Seen:
    """``fit`` in a process of its own, or in several; what the first of them saw.

    Raises:
        subprocess.CalledProcessError: It failed; what it printed has been shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seen.json"
        module = [sys.executable, "-W", "ignore", "-m", "reliability.soak.training"]
        command = [*module, json.dumps(asdict(run)), str(result)]
        subprocess.run(command, check=True)
        return Seen(**json.loads(result.read_text(encoding="utf-8")))


if __name__ == "__main__":
    found = fit(Run(**json.loads(sys.argv[1])))
    Path(sys.argv[2]).write_text(json.dumps(asdict(found)), encoding="utf-8")
