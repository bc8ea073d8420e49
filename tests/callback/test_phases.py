"""Phases in real runs: when they begin, who is told, and that batch norm stays frozen."""

import csv
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qat import QATCallback, Schedule
from lightning_qat.numerics.ways import way_on
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import BATCHES, Net, largest, loader, qat, ranges


class Phases(L.Callback):
    """Writes down what holds during every training batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        quantizer = next(iter(activation_quantizers(pl_module).values()))
        bn = pl_module.bn
        assert isinstance(bn, nn.BatchNorm2d)
        self.seen.append((quantizer.observing, quantizer.quantizing, not bn.training))


def test_phases_follow_the_schedule(trainer: Callable[..., L.Trainer]) -> None:
    schedule = Schedule(
        calibration_batches=2, quantize_from=1, freeze_observers=2, freeze_batchnorm=3
    )
    seen = Phases()
    trainer(QATCallback(schedule=schedule), seen, max_epochs=4).fit(Net(), loader())
    float_, calibrate = (False, False, False), (True, False, False)
    quantize, frozen, bn_frozen = (True, True, False), (False, True, False), (False, True, True)
    assert seen.seen == (
        [float_] * 4 + [calibrate] * 2 + [quantize] * 2 + [frozen] * 4 + [bn_frozen] * 4
    )


def test_fractions_are_of_the_run_and_steps_count_optimizer_steps(
    trainer: Callable[..., L.Trainer],
) -> None:
    schedule = Schedule(
        calibration_batches=0, freeze_observers=0.5, freeze_batchnorm=0.75, interval="step"
    )
    seen = Phases()
    # 2 epochs of 4 batches, accumulated by 2: 4 steps; frozen from step 2, batch norm from 3.
    trainer(QATCallback(schedule=schedule), seen, accumulate_grad_batches=2).fit(Net(), loader())
    assert [observing for observing, _, _ in seen.seen] == [True] * 4 + [False] * 4
    assert [frozen for _, _, frozen in seen.seen] == [False] * 6 + [True] * 2


def test_fractions_of_a_run_that_steps_alone_limit_are_of_its_epochs(
    trainer: Callable[..., L.Trainer],
) -> None:
    # 8 steps, 4 an epoch, are 2 epochs: ranges freeze with the second.
    schedule = Schedule(calibration_batches=0, freeze_observers=0.5, freeze_batchnorm=None)
    seen = Phases()
    trainer(QATCallback(schedule=schedule), seen, max_epochs=-1, max_steps=8).fit(Net(), loader())
    assert [observing for observing, _, _ in seen.seen] == [True] * 4 + [False] * 4


def test_each_phase_change_is_announced_once(
    trainer: Callable[..., L.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule)).fit(Net(), loader())
    assert f"QAT: quantizers run as {way_on(torch.device('cpu'))}" in caplog.messages
    lines = [m for m in caplog.messages if m.startswith("QAT: epoch")]
    assert [line.split(" (")[0] for line in lines] == [
        "QAT: epoch 0, step 0: calibrate",
        "QAT: epoch 0, step 1: quantize",
        "QAT: epoch 1, step 4: observers_frozen",
    ]


def test_the_phase_is_logged(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule), logger=logger, log_every_n_steps=1).fit(Net(), loader())
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [(int(row["step"]), float(row["qat/phase"])) for row in csv.DictReader(file)]
    assert rows == [(0, 1.0), (1, 2.0), (4, 3.0)]


def test_frozen_batchnorm_survives_a_users_train_call(trainer: Callable[..., L.Trainer]) -> None:
    class Rude(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            self.train()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.train()
            return super().training_step(batch)

    net = Rude()
    statistics = []

    class Watch(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
        ) -> None:
            statistics.append(net.bn.running_mean.clone())  # type: ignore[union-attr]

    schedule = Schedule(calibration_batches=0, freeze_observers=None, freeze_batchnorm=1)
    trainer(QATCallback(schedule=schedule), Watch()).fit(net, loader())
    assert not torch.equal(statistics[0], statistics[3])
    assert all(torch.equal(statistics[3], later) for later in statistics[4:])
    # The hold is gone after fit: the module is the user's again.
    net.train()(torch.randn(8, 1, 6, 6))
    assert not torch.equal(statistics[3], net.bn.running_mean)  # type: ignore[arg-type]


def test_fractions_of_an_endless_run_are_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(MisconfigurationException, match="fractions need a run of known length"):
        trainer(QATCallback(), max_epochs=-1).fit(Net(), loader())


def test_users_are_told_of_every_phase(trainer: Callable[..., L.Trainer]) -> None:
    told = []

    class Told(QATCallback):
        def on_phase_change(
            self, trainer: L.Trainer, pl_module: L.LightningModule, old: Phase | None, new: Phase
        ) -> None:
            told.append((trainer.global_step, old and old.name, new.name))
            quantizer = next(iter(activation_quantizers(pl_module).values()))
            assert quantizer.observing is new.observing

    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=2)
    trainer(Told(schedule=schedule), max_epochs=3).fit(Net(), loader())
    assert told == [
        (0, None, "calibrate"),
        (1, "calibrate", "quantize"),
        (4, "quantize", "observers_frozen"),
        (8, "observers_frozen", "batchnorm_frozen"),
    ]


def test_before_its_milestone_the_network_is_the_float_network(
    trainer: Callable[..., L.Trainer],
) -> None:
    def fit(*callbacks: L.Callback) -> list[float]:
        L.seed_everything(1, verbose=False)
        net = Net()
        trainer(*callbacks).fit(net, loader())
        return net.losses

    float_losses = fit()
    losses = fit(QATCallback(schedule=Schedule(calibration_batches=2, quantize_from=1)))
    # The first epoch and two batches of calibration; then weights and activations are quantized.
    assert losses[: BATCHES + 2] == float_losses[: BATCHES + 2]
    assert losses[BATCHES + 2] != float_losses[BATCHES + 2]


def test_frozen_batchnorm_survives_validation_within_an_epoch(
    trainer: Callable[..., L.Trainer],
) -> None:
    net, seen = Net(), Phases()
    schedule = Schedule(calibration_batches=1, freeze_observers=None, freeze_batchnorm=1)
    run = trainer(QATCallback(schedule=schedule), seen, val_check_interval=2)
    run.fit(net, loader(), loader(scale=50))
    assert [frozen for _, _, frozen in seen.seen] == [False] * BATCHES + [True] * BATCHES
    # The gate opens again after each validation.
    assert [observing for observing, _, _ in seen.seen] == [True] * 2 * BATCHES
    assert ranges(net)[0][1] <= largest(loader())


def test_a_learning_rate_far_above_the_recommended_one_is_warned_of_when_asked(
    trainer: Callable[..., L.Trainer],
) -> None:
    # The optimizer's 0.1 is what the float training began with; fine-tuning wants 0.001.
    with pytest.warns(UserWarning, match=r"about 1 % of the float training's .* 0.001; got 0.1"):
        trainer(qat(float_learning_rate=0.1)).fit(Net(), loader())
    trainer(qat(float_learning_rate=5.0)).fit(Net(), loader())
    trainer(qat()).fit(Net(), loader())
    with pytest.raises(ValueError, match=r"float_learning_rate must be positive or None; got 0"):
        qat(float_learning_rate=0)


class Stream(IterableDataset[list[Tensor]]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[list[Tensor]]:
        return iter(loader())


HALVES = Schedule(calibration_batches=1, freeze_observers=0.5, freeze_batchnorm=0.75)


@pytest.mark.parametrize(
    ("limits", "frozen"),
    [
        # 8 steps in all: half of them, and three quarters.
        ({"max_steps": 8, "max_epochs": -1}, [4, 6]),
        # Steps end the run long before its epochs do.
        ({"max_steps": 8, "max_epochs": 50}, [4, 6]),
        # Epochs do, of 4 steps each.
        ({"max_steps": 10**6, "max_epochs": 4}, [8, 12]),
        ({"max_epochs": 4}, [8, 12]),
        (
            {
                "max_steps": 8,
                "max_epochs": -1,
                "val_check_interval": 2,
                "check_val_every_n_epoch": None,
            },
            [4, 6],
        ),
    ],
)
def test_fractions_of_a_stream_are_of_its_steps_or_its_epochs(
    trainer: Callable[..., L.Trainer], limits: dict[str, Any], frozen: list[int]
) -> None:
    entered: dict[str, int] = {}

    class Told(QATCallback):
        def on_phase_change(self, trainer: L.Trainer, pl_module: Any, old: Any, new: Any) -> None:
            entered[new.name] = trainer.global_step

    stream = DataLoader(Stream(), batch_size=None)
    trainer(Told(schedule=HALVES), **limits).fit(Net(), stream)
    assert [entered["observers_frozen"], entered["batchnorm_frozen"]] == frozen


def test_fractions_count_from_where_a_float_run_is_taken_over(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    entered: list[tuple[int, str]] = []

    class Told(QATCallback):
        def on_phase_change(self, trainer: L.Trainer, pl_module: Any, old: Any, new: Any) -> None:
            entered.append((trainer.current_epoch, new.name))

    floats = trainer(max_epochs=6)
    floats.fit(Net(), loader())
    floats.save_checkpoint(tmp_path / "float.ckpt")
    taken = trainer(Told(schedule=HALVES), max_epochs=10)
    with pytest.warns(UserWarning, match="is of a float run"):
        taken.fit(Net(), loader(), ckpt_path=tmp_path / "float.ckpt")
    # Epochs 6 to 9: half of them, and three quarters.
    wanted = [(6, "calibrate"), (6, "quantize"), (8, "observers_frozen"), (9, "batchnorm_frozen")]
    assert entered == wanted
    # A checkpoint of this run remembers where it began.
    taken.save_checkpoint(tmp_path / "qat.ckpt")
    entered.clear()
    resumed = trainer(Told(schedule=HALVES), max_epochs=14)
    resumed.fit(Net(), loader(), ckpt_path=tmp_path / "qat.ckpt")
    assert entered == [(10, "batchnorm_frozen")]
    # The callback may also join a trainer that has trained in float.
    entered.clear()
    floats.callbacks.append(Told(schedule=HALVES))  # type: ignore[attr-defined]
    floats.fit_loop.max_epochs = 10
    floats.fit(Net(), loader())
    assert entered == wanted


@pytest.mark.parametrize("exporters", [[], ["fake_quant_onnx"]])
def test_a_float_checkpoint_whose_epochs_are_used_up_is_named(
    trainer: Callable[..., L.Trainer], tmp_path: Path, exporters: list[str]
) -> None:
    run = trainer()
    run.fit(Net(), loader())
    run.save_checkpoint(tmp_path / "float.ckpt")
    again = trainer(QATCallback(exporters=exporters, export_dir=tmp_path))
    text = r"No training batch ran.*at epoch 2 \(max_epochs=2\).*Net.load_from_checkpoint"
    said = pytest.raises(MisconfigurationException, match=text)
    if not exporters:
        said = pytest.warns(UserWarning, match=text)  # type: ignore[assignment]
    with said, pytest.warns(UserWarning, match="is of a float run"):
        again.fit(Net(), loader(), ckpt_path=tmp_path / "float.ckpt")
    # The remedy works.
    net = Net.load_from_checkpoint(tmp_path / "float.ckpt")
    trainer(qat()).fit(net, loader())
