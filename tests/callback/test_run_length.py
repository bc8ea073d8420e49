"""What a run is too short for is said before it trains."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat import QATCallback, Schedule
from tests.callback.tiny import BATCHES, Net, loader

pytestmark = pytest.mark.filterwarnings("ignore:QAT. (training|the run) ended:UserWarning")


class Stops(L.Callback):
    """Ends the run before its first batch."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> int:
        trainer.should_stop = True
        return -1


def said_before_training(
    caplog: pytest.LogCaptureFixture,
    trainer: Callable[..., L.Trainer],
    schedule: Schedule,
    data: Any = None,
    **limits: Any,
) -> list[str]:
    with caplog.at_level(logging.INFO):
        trainer(QATCallback(schedule=schedule), Stops(), **limits).fit(
            Net(), loader() if data is None else data
        )
    return [r.getMessage() for r in caplog.records if "QAT: warning: this run" in r.getMessage()]


@pytest.mark.parametrize(
    ("schedule", "limits", "batches"),
    [
        (Schedule(calibration_batches=2 * BATCHES), {"max_epochs": 2}, "8"),
        (Schedule(calibration_batches=BATCHES, quantize_from=1), {"max_epochs": 2}, "4"),
        (Schedule(calibration_batches=6, interval="step"), {"max_steps": 6, "max_epochs": 9}, "6"),
        (
            Schedule(calibration_batches=6, interval="step", quantize_from=1),
            {"max_steps": 4, "max_epochs": 9, "accumulate_grad_batches": 2},
            "6",
        ),
        (Schedule(calibration_batches=3), {"max_epochs": 1, "limit_train_batches": 3}, "3"),
    ],
)
def test_a_run_that_ends_within_calibration_is_told_so(
    schedule: Schedule,
    limits: dict[str, Any],
    batches: str,
    trainer: Callable[..., L.Trainer],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (message,) = said_before_training(caplog, trainer, schedule, **limits)
    assert f"has {batches} batches to quantize in, and calibration takes" in message
    assert "nothing would train quantized. Train longer, or lower" in message


def test_calibration_alone_needs_its_batches_and_no_more(
    trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    enough = Schedule.calibrate(BATCHES)
    assert said_before_training(caplog, trainer, enough, max_epochs=1) == []
    (message,) = said_before_training(
        caplog, trainer, Schedule.calibrate(BATCHES + 1), max_epochs=1
    )
    assert "has 4 of the 5 batches to calibrate on, so no bias would be corrected" in message


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Batches without a number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(8, 1, 6, 6), torch.zeros(8, dtype=torch.long)


def test_nothing_is_said_of_a_run_that_is_long_enough_or_whose_length_is_unknown(
    trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    schedule = Schedule(calibration_batches=BATCHES, freeze_observers=None, freeze_batchnorm=None)
    assert said_before_training(caplog, trainer, schedule, max_epochs=2) == []
    stream = DataLoader(Stream(), batch_size=None)
    endless = {"max_epochs": -1, "max_steps": 2}
    assert said_before_training(caplog, trainer, schedule, stream, **endless) == []
