"""The parts of Lightning that it does not promise to keep: each does what the callback needs."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from lightning_qat.callback.lightning_private import (
    UNSUPPORTED_STRATEGIES,
    after_configure_model,
    before_weights_are_loaded,
    configuration_error,
    implements_forward,
    is_fitting,
    load_train_data,
    loads_weights_after_wrapping,
)
from tests.callback.tiny import BATCHES, Net, loader


class Events(Net):
    """Notes what Lightning does with it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[str] = []

    def setup(self, stage: str) -> None:
        self.events.append("setup")

    def configure_model(self) -> None:
        self.events.append("configure_model")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.events.append("on_load_checkpoint")

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        self.events.append("load_state_dict")
        return super().load_state_dict(state_dict, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        self.events.append("configure_optimizers")
        return super().configure_optimizers()


class Patches(L.Callback):
    """Patches the module as ``QATCallback`` does."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        assert isinstance(pl_module, Events)
        events = pl_module.events
        after_configure_model(pl_module, lambda: events.append("QAT: prepare"))
        before_weights_are_loaded(
            pl_module, lambda checkpoint: events.append(f"QAT: {'state_dict' in checkpoint}")
        )


def test_the_patched_methods_run_once_between_setup_and_the_weights(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    first = trainer(max_epochs=1)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "1.ckpt")
    net = Events()
    trainer(Patches(), max_epochs=2).fit(net, loader(), ckpt_path=tmp_path / "1.ckpt")
    order = "configure_model, QAT: prepare, QAT: True, on_load_checkpoint, load_state_dict"
    assert net.events == ["setup", *order.split(", "), "configure_optimizers"]
    assert not {"configure_model", "on_load_checkpoint"} & vars(net).keys()


def test_configure_model_runs_where_the_module_has_none_of_its_own(
    trainer: Callable[..., L.Trainer],
) -> None:
    called = []

    class Patch(L.Callback):
        def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
            after_configure_model(pl_module, lambda: called.append(stage))

    run = trainer(Patch(), max_epochs=1)
    net = Net()
    run.fit(net, loader(), loader())
    run.validate(net, loader())
    assert called == ["fit", "validate"]


def test_train_data_can_be_loaded_before_the_first_epoch(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Length(L.Callback):
        found: float = 0

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            load_train_data(trainer)
            self.found = trainer.num_training_batches
            load_train_data(trainer)  # twice is as well

    length = Length()
    run = trainer(length, max_steps=2)
    run.fit(Net(), loader())
    assert length.found == BATCHES
    assert run.global_step == 2


def test_the_stages_of_fit_are_told_from_other_calls(trainer: Callable[..., L.Trainer]) -> None:
    class Stages(L.Callback):
        def __init__(self) -> None:
            self.fitting: list[bool] = []

        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            self.fitting.append(is_fitting(trainer))

    stages = Stages()
    run = trainer(stages, max_epochs=1, num_sanity_val_steps=1)
    net = Net()
    run.fit(net, loader(), loader())
    run.validate(net, loader())
    assert stages.fitting == [True, True, False]


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy()])
def test_supported_strategies_load_weights_before_wrapping(strategy: Strategy) -> None:
    assert loads_weights_after_wrapping(strategy) is False


def test_unsupported_strategies_would_pass_for_supported_ones() -> None:
    names = {kind.__name__ for kind in UNSUPPORTED_STRATEGIES}
    assert {"DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"} < names
    assert {"XLAStrategy", "SingleDeviceXLAStrategy"} < names
    passing = [
        k for k in UNSUPPORTED_STRATEGIES if issubclass(k, SingleDeviceStrategy | DDPStrategy)
    ]
    assert len(passing) == 3


def test_a_forward_of_the_module_is_told_from_lightning_s() -> None:
    class Headless(L.LightningModule):
        pass

    assert implements_forward(Net())
    assert not implements_forward(Headless())


def test_a_wrong_setup_raises_what_lightning_raises(trainer: Callable[..., L.Trainer]) -> None:
    assert type(configuration_error("text")) is MisconfigurationException
    with pytest.raises(MisconfigurationException):
        trainer(max_epochs=1).fit(L.LightningModule(), loader())
