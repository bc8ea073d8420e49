"""What a real trainer is told of its run, on the console."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Recipe, Schedule


class Net(L.LightningModule):
    """Two layers; what the second reads is scaled by hand."""

    def __init__(self, rate: float = 1e-3) -> None:
        super().__init__()
        self.rate = rate
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss: Tensor = (self(batch[0]) - batch[1]).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate)


def loader(change: Callable[[Tensor], Tensor] = lambda x: x) -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    x = torch.randn(60 * 16, 16)
    return DataLoader(TensorDataset(change(x), x[:, :1]), batch_size=16)


def warnings_of(
    caplog: pytest.LogCaptureFixture,
    module: Net,
    data: DataLoader[tuple[Tensor, ...]],
    batches: int = 60,
    **recipe: Any,
) -> list[str]:
    schedule = Schedule(calibration_batches=8, interval="step")
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=batches,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(Recipe.from_dict(recipe), schedule)],
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(module, data)
    return [r.getMessage() for r in caplog.records if "QAT: warning:" in r.getMessage()]


def test_a_healthy_run_has_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of(caplog, Net(), loader()) == []


def test_one_large_value_leaves_few_integers_for_the_rest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def with_an_outlier(x: Tensor) -> Tensor:
        x[::16, 0] = 1000.0
        return x

    torch.manual_seed(0)
    (message,) = warnings_of(caplog, Net(1e-9), loader(with_an_outlier))
    assert "fewer than 16 integers are used by 'first' (" in message
    assert "{calibration: percentile}" in message


def test_values_that_grow_beyond_a_fixed_range_are_clipped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    overrides = {"second": {"activation": {"clip": (-0.1, 0.1)}}}
    (message,) = warnings_of(caplog, Net(), loader(), overrides=overrides)
    assert "more than 10% of the values lie outside of the range of 'second' (8" in message


def test_too_high_a_learning_rate_is_told_before_anything_is_quantized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    # The losses are 0.64, 0.77, 1.28, 1.31, 2.5, 4.7, 46, ...
    found = warnings_of(caplog, Net(rate=0.45), loader(), batches=9)
    assert "too high to fine-tune" in found[0]


def test_data_that_are_all_the_same_are_told_of_in_the_first_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (message,) = warnings_of(caplog, Net(), loader(lambda x: torch.full_like(x, 3.0)), batches=9)
    assert "all values are the same in 'first' (3), which gives no range" in message


def test_a_layer_that_is_dead_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    module = Net()
    torch.nn.init.zeros_(module.first.weight)
    torch.nn.init.zeros_(module.first.bias)
    (message,) = warnings_of(caplog, module, loader(), batches=9)
    assert "all values are the same in 'second' (0), which gives no range" in message
