"""Exceptions and Ctrl-C leave the module usable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import QATCallback, Schedule
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.callback.tiny import BATCHES, Net, Planned, largest, loader, qat, ranges


class Stop(L.Callback):
    """Raises after a number of steps."""

    def __init__(self, error: BaseException, step: int = 6) -> None:
        self.error, self.step = error, step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        if trainer.global_step == self.step:
            raise self.error


SCHEDULE = Schedule(calibration_batches=1, freeze_batchnorm=1)


@pytest.mark.parametrize(
    ("error", "seen"),
    [(RuntimeError("crash"), RuntimeError), (KeyboardInterrupt(), SystemExit)],
    ids=["exception", "Ctrl-C"],
)
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_a_run_that_stops_in_the_middle_leaves_the_module_clean(
    trainer: Callable[..., L.Trainer], tmp_path: Path, error: BaseException, seen: Any
) -> None:
    net = Net()
    callback = QATCallback(
        schedule=SCHEDULE, exporters=["fake_quant_onnx"], export_dir=tmp_path / "out"
    )
    with pytest.raises(seen):
        trainer(callback, Stop(error)).fit(net, loader())
    assert not net.bn._forward_pre_hooks
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(net))
    # Nothing is exported of a run that did not end.
    assert list((tmp_path / "out").iterdir()) == []
    trainer(QATCallback(schedule=SCHEDULE)).fit(net, loader())


@pytest.mark.parametrize("error", [RuntimeError("in the middle"), KeyboardInterrupt()], ids=type)
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_a_forward_that_is_interrupted_leaves_nothing_running(
    trainer: Callable[..., L.Trainer], error: BaseException
) -> None:
    class Fragile(nn.Identity):
        left = 0

        def forward(self, input: Tensor) -> Tensor:
            self.left -= self.training
            if self.left < 0:
                raise error
            return input

    class Raises(Planned):
        def __init__(self) -> None:
            super().__init__()
            self.fragile = Fragile()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(F.relu(self.fragile(self.bn(self.conv(x)))).mean((2, 3)))
            return logits

    net = Raises()
    with pytest.raises((RuntimeError, SystemExit)):
        trainer(qat()).fit(net, loader(scale=100))
    assert net.losses == []
    net.fragile.left = 1000
    trainer(qat()).fit(net, loader())
    # What the interrupted batch observed is not part of any range.
    assert ranges(net)[0][1] <= largest(loader())


@pytest.mark.parametrize("where", ["setup", "configure_model", "configure_optimizers"])
def test_an_error_before_training_leaves_the_module_clean(
    trainer: Callable[..., L.Trainer], where: str
) -> None:
    class Broken(Net):
        pass

    def broken(*args: object, **kwargs: object) -> None:
        raise ValueError("broken")

    setattr(Broken, where, broken)
    net = Broken()
    with pytest.raises(ValueError, match="broken"):
        trainer(qat()).fit(net, loader())
    assert not {"configure_model", "on_load_checkpoint"} & set(vars(net))
    delattr(Broken, where)
    trainer(qat()).fit(net, loader())
    assert len(net.losses) == 2 * BATCHES


def test_an_exporter_that_raises_anything_is_reported_and_leaves_the_module_trained(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Odd:
        name = "odd"

        def check_available(self) -> None: ...

        def export(self, model: QuantizedModel, path_prefix: Path) -> Any:
            raise AssertionError("odd")

    net = Net()
    with pytest.raises(RuntimeError, match=r"1 of 1 exports failed.*\nodd: AssertionError: odd"):
        trainer(qat(exporters=[Odd()], export_dir=tmp_path / "out")).fit(net, loader())
    trainer(qat()).fit(net, loader())
