"""What the callback itself adds to a training step; `benchmarks.distributed` has what it sends.

    python -m benchmarks.callback

Time: a ResNet-20 (batch 32, 3x32x32) in a real Trainer; the callback's own hooks are timed, phases,
ranges and logging included, as a share of the time between the starts of successive batches. While
ranges follow the data every batch commits them; once frozen nothing is left but the checks. Last
comes what ``log=50`` adds, without what a logger itself takes: a logged step, hooks in the forward
included, against one that is not, divided by 50.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.joins import ResNet20
from lightning_qat import QATCallback, Schedule
from lightning_qat.training.range_sync import activation_quantizers

PHASES = {
    "observing": Schedule(calibration_batches=1, freeze_observers=None, freeze_batchnorm=None),
    "frozen": Schedule(calibration_batches=1, freeze_observers=0, freeze_batchnorm=0),
}


class Module(L.LightningModule):
    """The network and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet20()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ``(batch, 3, 32, 32)``."""
        logits: Tensor = self.network(x)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), 1e-3, momentum=0.9)


class Timed(QATCallback):
    """Takes the time of its own hooks, and of the steps."""

    def __init__(self, schedule: Schedule, log: int | None) -> None:
        super().__init__(schedule=schedule, log=log)
        self.own: list[float] = []
        self.starts: list[float] = []

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Time of the first hook of a batch."""
        self.starts.append(time.perf_counter())
        self.own.append(self._seconds(super().on_train_batch_start, *args, **kwargs))

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Time of the last hook of a batch."""
        self.own[-1] += self._seconds(super().on_train_batch_end, *args, **kwargs)

    @staticmethod
    def _seconds(hook: Callable[..., None], *args: Any, **kwargs: Any) -> float:
        start = time.perf_counter()
        hook(*args, **kwargs)
        return time.perf_counter() - start


def time_added(
    schedule: Schedule, batches: int, log: int | None = None
) -> tuple[float, float, int]:
    """Median seconds of the callback and of a step, and the number of quantizers."""
    x, y = torch.randn(32 * batches, 3, 32, 32), torch.randint(0, 10, (32 * batches,))
    callback, module = Timed(schedule, log), Module()
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=DummyLogger(),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(TensorDataset(x, y), 32))
    steps = [b - a for a, b in zip(callback.starts[3:], callback.starts[4:], strict=False)]
    quantizers = len(activation_quantizers(module))
    return statistics.median(callback.own[3:-1]), statistics.median(steps), quantizers


def main(batches: int = 40, threads: int = 2) -> None:
    """Print the table."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"ResNet-20, batch 32, {threads} threads, median of {batches} batches")
    for name, schedule in PHASES.items():
        own, step, quantizers = time_added(schedule, batches)
        print(
            f"  {name:10} callback {own * 1e3:6.3f} ms of a step of {step * 1e3:6.1f} ms: "
            f"{own / step:.2%} ({quantizers} quantizers)"
        )
    step, logged = (time_added(PHASES["frozen"], batches, log)[1] for log in (None, 1))
    added = (logged - step) / 50
    print(f"  log=50     {added * 1e3:6.3f} ms per step: {added / step:.2%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the callback itself adds to a step.")
    parser.add_argument("--batches", type=int, default=40, help="batches per run (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    main(options.batches, options.threads)
