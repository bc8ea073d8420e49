"""A fit that only calibrates: ranges and corrected biases, and not a single training step."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_qat import QATCallback, Schedule, calibrate
from lightning_qat.training.range_sync import activation_quantizers
from tests.tiny_module import TinyModule, random_loader


def trainer(tmp_path: Path, callback: QATCallback, **options: Any) -> pl.Trainer:
    return pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        callbacks=[callback, *options.pop("callbacks", [])],
        logger=options.pop("logger", False),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 20, **options},
    )


class Watched(TinyModule):
    """Counts its steps, and what would train it."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[bool, bool]] = []
        self.optimizer_steps = 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.steps.append((self.training, torch.is_grad_enabled()))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1.0, weight_decay=0.5)
        optimizer.register_step_pre_hook(self._count)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def _count(self, *args: Any) -> None:
        self.optimizer_steps += 1


def test_weights_stay_and_the_fit_stops_after_its_batches(tmp_path: Path) -> None:
    module = Watched()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    callback = QATCallback(schedule=Schedule.calibrate(3, correct_biases=False))
    run = trainer(tmp_path, callback, logger=CSVLogger(tmp_path), callbacks=[LearningRateMonitor()])
    run.fit(module, random_loader(samples=40))
    assert module.steps == [(False, False)] * 3
    assert module.optimizer_steps == 0
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(quantizer.calibrated for quantizer in activation_quantizers(module).values())
    assert module.training
    assert "training_step" not in vars(module)


class BatchAlone(TinyModule):
    """Its ``training_step`` has no number of the batch."""

    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


def logged(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return call


class Decorated(TinyModule):
    """Lightning looks through one decorator."""

    @logged
    def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().training_step(batch, 0)


class AnyArguments(TinyModule):
    """Gets all that Lightning has."""

    def training_step(self, *args: Any) -> Tensor:  # type: ignore[override]
        batch, number = args
        return super().training_step(batch, number)


@pytest.mark.parametrize("kind", [BatchAlone, Decorated, AnyArguments])
def test_a_training_step_gets_what_it_gets_in_training(tmp_path: Path, kind: Any) -> None:
    module = kind()
    trainer(tmp_path, QATCallback(schedule=Schedule.calibrate(2))).fit(module, random_loader())
    assert all(quantizer.calibrated for quantizer in activation_quantizers(module).values())


def test_biases_are_those_of_the_function(tmp_path: Path) -> None:
    module = TinyModule()
    alone = copy.deepcopy(module).eval()
    batches = list(random_loader(samples=32))
    callback = QATCallback(
        "w4a4", schedule=Schedule.calibrate(4), example_inputs=torch.zeros_like(batches[0][0])
    )
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(module, random_loader(samples=16))
    calibrate(alone, [x for x, _ in batches[:4]], "w4a4")
    expected, found = alone.state_dict(), module.state_dict()
    for name in ("features.1.running_mean", "features.4.running_var", "head.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


def test_the_files_are_written(tmp_path: Path) -> None:
    callback = QATCallback(
        schedule=Schedule.calibrate(2), exporters=["fake_quant_onnx"], export_dir=tmp_path / "out"
    )
    trainer(tmp_path, callback).fit(TinyModule(), random_loader())
    assert (tmp_path / "out/manifest.json").is_file()
    assert [result.error for result in callback.delivered] == [None]


@pytest.mark.parametrize("correct_biases", [True, False])
def test_validation_sees_the_quantized_module(tmp_path: Path, correct_biases: bool) -> None:
    module, seen = TinyModule(), []

    class Note(pl.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            quantizers = activation_quantizers(pl_module).values()
            seen.append({quantizer.quantizing for quantizer in quantizers})

    callback = QATCallback(schedule=Schedule.calibrate(2, correct_biases))
    run = trainer(tmp_path, callback, callbacks=[Note()], num_sanity_val_steps=0)
    run.fit(module, random_loader(), random_loader())
    assert seen == [{True}]


def test_a_run_that_is_too_short_is_said(tmp_path: Path) -> None:
    callback = QATCallback(schedule=Schedule.calibrate(8))
    with pytest.warns(UserWarning, match="ended after 4 of 8 calibration batches"):
        trainer(tmp_path, callback, max_epochs=1).fit(TinyModule(), random_loader(samples=16))


class Manual(TinyModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        optimizer.step()  # type: ignore[union-attr]
        return loss


def test_manual_optimization_trains_nothing_either(tmp_path: Path) -> None:
    module = Manual()
    before = {name: value.clone() for name, value in module.named_parameters()}
    callback = QATCallback(schedule=Schedule.calibrate(2, correct_biases=False))
    trainer(tmp_path, callback).fit(module, random_loader())
    assert all(torch.equal(v, before[n]) for n, v in module.named_parameters() if n in before)


def test_a_schedule_that_trains_corrects_no_biases() -> None:
    with pytest.raises(ValueError, match=r"needs train=False.*Schedule\.calibrate"):
        Schedule(correct_biases=True)


def test_calibration_needs_a_batch() -> None:
    with pytest.raises(ValueError, match="must be 1 or more where nothing is trained"):
        Schedule.calibrate(0)
