"""What quantization-aware training sends between processes, against the number of layers.

    python -m benchmarks.distributed

Two processes (gloo, DistributedDataParallel, a real Trainer) train a chain of quantized layers, one
epoch while ranges follow the data and one with them frozen. Counted are the collectives that are
called from Python within a batch: all of the callback's, and none of the gradients', which DDP
sends from C++. Expected is one call of 8 bytes (two float32) per quantizer, however many layers
there are, and none once frozen. Exits with 1 where that does not hold.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Recipe, Schedule

# Here, because the processes that train import this module and run nothing else of it.
warnings.filterwarnings("ignore")
for logger in ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero"):
    logging.getLogger(logger).setLevel(logging.ERROR)

BYTES = 8
"""Of a range: two float32."""

COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast"),
    *("broadcast_object_list", "gather", "reduce", "reduce_scatter", "scatter", "barrier"),
)


class Chain(L.LightningModule):
    """Linear layers, one after the other."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.network = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        """The mean square of the output."""
        output: Tensor = self.network(batch[0])
        return output.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), 1e-3)


class Collectives(L.Callback):
    """Notes the sizes of what is sent from Python within each batch.

    Args:
        sent: Where the first process puts them: per batch a list of bytes per call.
    """

    def __init__(self, sent: Any) -> None:
        self.sent = sent
        self.batches: list[list[int]] = []
        self.inside = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the place of torch's functions, in the process that trains."""
        for name in COLLECTIVES:
            setattr(dist, name, self.counted(getattr(dist, name)))

    def counted(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its calls within a batch are noted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                tensors = [a for a in args if isinstance(a, Tensor)]
                self.batches[-1].append(sum(t.numel() * t.element_size() for t in tensors))
            return collective(*args, **kwargs)

        return call

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self.inside = True
        self.batches.append([])

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Stop counting; the callback's own hook was called before."""
        self.inside = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Hand over."""
        if trainer.is_global_zero:
            self.sent.put(self.batches)


def train(layers: int, batches: int = 3) -> tuple[list[list[int]], list[list[int]]]:
    """Bytes of every call in every batch of the observing and of the frozen epoch."""
    torch.manual_seed(0)
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    recipe = Recipe(joins=False, outputs=False)
    L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        callbacks=[QATCallback(recipe, schedule), Collectives(queue)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Chain(layers), DataLoader(TensorDataset(torch.randn(4 * batches, 4)), 2))
    sent: list[list[int]] = queue.get()
    return sent[:batches], sent[batches:]


def main(sizes: list[int]) -> int:
    """Print the table; the number of sizes at which something else than expected was sent."""
    print("two processes, gloo: what the callback sends in a batch")
    print("layers  observing: calls  bytes  bytes per layer  frozen: calls")
    wrong = 0
    for layers in sizes:
        observing, frozen = train(layers)
        wrong += any(batch != [BYTES * layers] for batch in observing) or any(frozen)
        most = max(observing, key=sum)
        calls, size = max(map(len, observing)), sum(most)
        print(
            f"{layers:6d}  {calls:16d}  {size:5d}  {size / layers:15.1f}  "
            f"{max(map(len, frozen)):13d}"
        )
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[10, 100, 1000], help="default: 10 100 1000"
    )
    sys.exit(min(main(parser.parse_args().layers), 1))
