"""What the callback itself adds to a training step, and what it sends under DDP.

    python -m benchmarks.callback

Time: a ResNet-20 (batch 32, 3x32x32) in a real Trainer; the callback's own hooks are timed, phases,
ranges and logging included, as a share of the time between the starts of successive batches. While
ranges follow the data every batch commits them; once frozen nothing is left but the checks.

Collectives: two processes (gloo) and a chain of 10, 100 and 1,000 quantized layers; calls and bytes
of each batch.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.joins import ResNet20
from lightning_qat import QATCallback, Recipe, Schedule, prepare
from lightning_qat.phases import activation_quantizers, apply_phase, commit_ranges
from lightning_qat.schedule import Phase

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

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule=schedule)
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


def time_added(schedule: Schedule, batches: int) -> tuple[float, float, int]:
    """Median seconds of the callback and of a step, and the number of quantizers."""
    x, y = torch.randn(32 * batches, 3, 32, 32), torch.randint(0, 10, (32 * batches,))
    callback, module = Timed(schedule), Module()
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(TensorDataset(x, y), 32))
    steps = [b - a for a, b in zip(callback.starts[3:], callback.starts[4:], strict=False)]
    quantizers = len(activation_quantizers(module))
    return statistics.median(callback.own[3:-1]), statistics.median(steps), quantizers


def count(rank: int, port: int, layers: int, queue: Any) -> None:
    """One process of two: calls, bytes and seconds of a batch that observes and of a frozen one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    prepare(model, Recipe(joins=False, outputs=False))
    sent: list[int] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    apply_phase(model, Phase("quantize", True, True, False))
    seconds = []
    for _ in range(5):
        model(torch.randn(2, 4))
        sent.clear()
        start = time.perf_counter()
        commit_ranges(model)
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        queue.put((len(sent), sum(sent), statistics.median(seconds)))
    dist.destroy_process_group()


def main(batches: int = 40, threads: int = 2) -> None:
    """Print both tables."""
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
    print("two processes, gloo: collectives of an observing batch")
    context = multiprocessing.get_context("spawn")
    for layers in (10, 100, 1000):
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        queue = context.SimpleQueue()
        both = [context.Process(target=count, args=(r, port, layers, queue)) for r in (0, 1)]
        for process in both:
            process.start()
        calls, size, seconds = queue.get()
        for process in both:
            process.join()
        print(f"  {layers:5} quantizers: {calls} call, {size} bytes, {seconds * 1e3:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the callback itself adds to a step.")
    parser.add_argument("--batches", type=int, default=40, help="batches per run (default: 40)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    main(options.batches, options.threads)
