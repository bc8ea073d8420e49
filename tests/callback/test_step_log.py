"""Quantizers of a step in Lightning's loggers, when they are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_qat import Schedule
from tests.callback.tiny import SHORT, Planned, loader, qat


class Histograms(Logger):
    """Takes histograms, as TensorBoard's writer does."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}
        self.histograms: dict[tuple[str, int], Any] = {}

    @property
    def experiment(self) -> Any:
        return self

    def add_histogram(self, tag: str, values: Any, global_step: int, bins: int) -> None:
        assert bins == 64
        self.histograms[tag, global_step] = values

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.metrics.setdefault(step, {}).update(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @property
    def name(self) -> str:
        return "histograms"

    @property
    def version(self) -> int:
        return 0


def quantizer_steps(logger: Histograms) -> list[int]:
    return [step for step, metrics in logger.metrics.items() if "qat/range_max/conv" in metrics]


def test_every_nth_step_is_logged(trainer: Callable[..., L.Trainer]) -> None:
    logger = Histograms()
    trainer(qat(schedule=SHORT, log=3), max_epochs=2, logger=logger).fit(Planned(), loader())
    # Ranges are known after the first batch; two calibrate, so weights are float in step 0.
    assert quantizer_steps(logger) == [0, 3, 6]
    assert {"qat/clipped/head", "qat/weight_sqnr_db/conv.weight"} <= logger.metrics[3].keys()
    assert 0 <= logger.metrics[3]["qat/clipped/head"] < 0.5
    assert 30 < logger.metrics[6]["qat/weight_sqnr_db/head.weight"] < 60
    assert "qat/weight_sqnr_db/conv.weight" not in logger.metrics[0]


def test_a_logger_that_has_histograms_gets_them(trainer: Callable[..., L.Trainer]) -> None:
    logger = Histograms()
    trainer(qat(schedule=SHORT, log=4), max_epochs=2, logger=logger).fit(Planned(), loader())
    tags = {tag for tag, step in logger.histograms if step == 4}
    assert {"qat/conv", "qat/head", "qat/conv.weight", "qat/head.weight"} <= tags
    assert all(isinstance(values, np.ndarray) for values in logger.histograms.values())


def test_nothing_is_logged_unless_asked_for(trainer: Callable[..., L.Trainer]) -> None:
    logger = Histograms()
    trainer(qat(schedule=SHORT), max_epochs=2, logger=logger).fit(Planned(), loader())
    assert not quantizer_steps(logger)
    assert not logger.histograms


def test_logging_changes_no_number_of_the_training(trainer: Callable[..., L.Trainer]) -> None:
    losses = []
    for log in (None, 1):
        L.seed_everything(1)
        net = Planned()
        trainer(qat(schedule=SHORT, log=log), max_epochs=2, logger=Histograms()).fit(net, loader())
        losses.append(net.losses)
    assert losses[0] == losses[1]


def test_batches_that_share_a_step_are_logged_once(trainer: Callable[..., L.Trainer]) -> None:
    logger = Histograms()
    schedule = Schedule(calibration_batches=1, freeze_observers=None, freeze_batchnorm=None)
    trainer(
        qat(schedule=schedule, log=1), max_epochs=1, logger=logger, accumulate_grad_batches=2
    ).fit(Planned(), loader())
    assert quantizer_steps(logger) == [0, 1]


def test_a_second_fit_is_logged_from_its_first_step(trainer: Callable[..., L.Trainer]) -> None:
    callback, loggers = qat(schedule=SHORT, log=100), (Histograms(), Histograms())
    for logger in loggers:
        trainer(callback, max_epochs=1, logger=logger).fit(Planned(), loader())
    assert [quantizer_steps(logger) for logger in loggers] == [[0], [0]]


def test_a_csv_file_holds_the_numbers(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(qat(schedule=SHORT, log=2), max_epochs=1, logger=logger).fit(Planned(), loader())
    assert "qat/range_max/conv" in Path(logger.log_dir, "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize("log", [0, -1, 2.5, True, "50"])
def test_an_interval_is_a_number_of_steps(log: Any) -> None:
    with pytest.raises(ValueError, match=r"log must be None or a number of steps.*got"):
        qat(log=log)
