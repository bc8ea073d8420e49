"""Warnings and ranges of a network with a frozen part, two inputs and a branch in eval."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Recipe, Schedule
from lightning_qat.training.range_sync import activation_quantizers

BATCHES, SIZE = 40, 16
Batch = list[Tensor]


class Detector(L.LightningModule):
    """A frozen backbone in eval mode, numbers beside the picture, probabilities in eval alone."""

    def __init__(self, rate: float = 1e-3) -> None:
        super().__init__()
        self.rate = rate
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        ).requires_grad_(False)
        self.beside, self.head = nn.Linear(16, 8), nn.Linear(16, 5)
        self.example_input_array = (torch.zeros(2, 3, 8, 8), torch.zeros(2, 16))

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, picture: Tensor, numbers: Tensor) -> Tensor:
        features = self.backbone(picture).mean((2, 3))
        y: Tensor = self.head(torch.cat([features, F.relu(self.beside(numbers))], 1))
        return y if self.training else torch.softmax(y, 1)

    def training_step(self, batch: Batch) -> dict[str, Tensor]:
        picture, numbers, wanted = batch
        return {"loss": F.cross_entropy(self(picture, numbers), wanted)}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], self.rate)


def data(change: Callable[[Tensor, Tensor], None]) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    count = BATCHES * SIZE
    pictures = torch.randn(count, 3, 8, 8, generator=generator)
    numbers = torch.randn(count, 16, generator=generator)
    change(pictures, numbers)
    wanted = (numbers[:, :5].argmax(1) + 1) % 5
    return DataLoader(TensorDataset(pictures, numbers, wanted), batch_size=SIZE)


def fitted(
    recipe: Recipe | str = "int8",
    rate: float = 1e-3,
    change: Callable[[Tensor, Tensor], None] = lambda pictures, numbers: None,
) -> Detector:
    torch.manual_seed(0)
    module = Detector(rate).train()
    assert not module.backbone.training
    L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(recipe, Schedule(calibration_batches=8, interval="step"))],
    ).fit(module, data(change))
    return module


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    def told(**options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fitted(**options)
        return [r.getMessage() for r in caplog.records if "QAT: warning:" in r.getMessage()]

    return told


def test_a_healthy_run_is_told_nothing(told: Callable[..., list[str]]) -> None:
    assert told() == []


def test_a_range_too_narrow_within_the_frozen_part_is_told(
    told: Callable[..., list[str]],
) -> None:
    narrow = {"backbone.3": {"activation": {"clip": (0.0, 0.05)}}}
    (message,) = told(recipe=Recipe(overrides=narrow))
    assert "more than 10% of the values lie outside of the range of 'backbone.3' (" in message


def test_an_outlier_in_the_second_input_is_told(told: Callable[..., list[str]]) -> None:
    def with_an_outlier(pictures: Tensor, numbers: Tensor) -> None:
        numbers[::SIZE, 0] = 1000.0

    (message,) = told(change=with_an_outlier, rate=1e-9)
    assert "fewer than 16 integers are used by 'beside' (" in message


def test_too_high_a_learning_rate_is_told_where_only_the_head_trains(
    told: Callable[..., list[str]],
) -> None:
    message = told(rate=5.0)[0]
    assert "while nothing was quantized: the learning rate is too high to fine-tune" in message


def ends(module: nn.Module) -> dict[str, float]:
    """The highest value of every range."""
    found = {}
    for name, quantizer in activation_quantizers(module).items():
        scale, zero_point = quantizer.scale_and_zero_point()
        found[name] = float((quantizer.grid.qmax - zero_point) * scale)
    return found


@pytest.mark.parametrize("kind", ["observed", "learned"])
def test_ranges_follow_inputs_that_grow_in_a_frozen_part_too(kind: str) -> None:
    """From the tenth batch on both inputs are twenty times as large, about 80 at most."""

    def growing(pictures: Tensor, numbers: Tensor) -> None:
        pictures[10 * SIZE :] *= 20
        numbers[10 * SIZE :] *= 20

    activation = {"quantizer": kind}
    high = ends(fitted(Recipe.from_dict({"activation": activation}), 1e-6, growing))
    assert 50 < high["backbone.0.input_quantizer"] < 120
    assert 50 < high["beside.input_quantizer"] < 120
    before = ends(fitted(Recipe.from_dict({"activation": activation}), 1e-6))
    assert 10 < high["backbone.3.input_quantizer"] / before["backbone.3.input_quantizer"] < 30
