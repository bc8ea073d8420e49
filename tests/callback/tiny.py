"""One tiny module, its data, and what the tests of the callback read off it."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Schedule
from lightning_qat.training.range_sync import activation_quantizers

BATCHES = 4
"""Batches per epoch: 32 samples in batches of 8."""

SHORT = Schedule(calibration_batches=2, freeze_observers=None, freeze_batchnorm=None)
"""For runs of a few batches: two calibrate, the others are quantized and observed."""


class Net(L.LightningModule):
    """Convolution, batch norm, relu, mean, linear; takes (batch, 1, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: list[Tensor]) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor]) -> None:
        self.validation_step(batch)

    def predict_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Planned(Net):
    """Knows its inputs, so that every quantizer exists before training."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 6, 6)


def qat(recipe: Any = "int8", **options: Any) -> QATCallback:
    """The callback with a schedule for short runs; test_trial_export.py tries the exports, too."""
    return QATCallback(recipe, **{"schedule": SHORT, "trial_export": False, **options})


def loader(scale: float = 1.0, seed: int = 0, batch_size: int = 8) -> DataLoader[Any]:
    """The same batches for the same seed, in the same order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * BATCHES, 1, 6, 6, generator=generator) * scale
    y = torch.randint(0, 3, (8 * BATCHES,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def followed(batches: list[tuple[float, float]]) -> tuple[float, float]:
    """Where the range of a moving average ends with ``SHORT``, in double precision."""
    low, high = batches[0]
    for seen, (least, most) in enumerate(batches[1:], 1):
        low += (least - low) / (seen + 1)
        high += (most - high) / (seen + 1)
        if seen >= SHORT.calibration_batches:
            # Values are quantized: a wider batch counts at once.
            low, high = min(low, least), max(high, most)
    return low, high


def ranges(module: nn.Module) -> list[tuple[float, float]]:
    """Of every activation quantizer, the input's first."""
    return [(float(q.min_val), float(q.max_val)) for q in activation_quantizers(module).values()]


def largest(batches: DataLoader[Any]) -> float:
    """The largest input of all batches."""
    return max(float(x.max()) for x, _ in batches)


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
