"""Several fits, modules, trainers and processes of one callback."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import QATCallback, Schedule, prepare
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.layers import Conv2dQAT
from tests.callback.tiny import BATCHES, SHORT, Net, loader, qat, ranges


def test_fit_may_be_called_again(trainer: Callable[..., L.Trainer]) -> None:
    net, callback = Net(), qat()
    trainer(callback).fit(net, loader())
    before = net.head.weight.clone()
    trainer(callback).fit(net, loader())
    assert not torch.equal(before, net.head.weight)


def test_another_module_is_trained_as_if_the_callback_were_new(
    trainer: Callable[..., L.Trainer],
) -> None:
    def fit(callback: QATCallback) -> Net:
        L.seed_everything(1, verbose=False)
        net = Net()
        trainer(callback).fit(net, loader())
        return net

    callback = qat()
    first, second, new = fit(callback), fit(callback), fit(qat())
    # Calibration, phases and recorded inputs start anew.
    assert first.losses == second.losses == new.losses
    assert ranges(second) == ranges(new)


def test_a_module_with_other_inputs_is_exported_with_its_own(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Flat(Net):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(36, 3)
            del self.conv, self.bn

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(x)
            return logits

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return super().training_step([batch[0].flatten(1), batch[1]])

    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path, verify=False)
    trainer(callback).fit(Net(), loader())
    trainer(callback).fit(Flat(), loader())
    assert QuantizedModel.load(tmp_path / "flat.pt2")(torch.zeros(3, 36)).shape == (3, 3)


def test_the_same_trainer_goes_on_where_it_stopped(trainer: Callable[..., L.Trainer]) -> None:
    callback = QATCallback(
        schedule=Schedule(calibration_batches=6, freeze_observers=None, freeze_batchnorm=None)
    )
    net = Net()
    run = trainer(callback, max_epochs=1)
    with pytest.warns(UserWarning, match="ended in phase 'calibrate' after 4 of 6 calibration"):
        run.fit(net, loader())
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())
    assert callback.state_dict()["batches_seen"] == 3 * BATCHES
    assert callback.state_dict()["phase"]["name"] == "quantize"


def test_the_module_may_bring_the_callback_itself(trainer: Callable[..., L.Trainer]) -> None:
    class Configured(Net):
        def configure_callbacks(self) -> list[L.Callback]:
            return [qat()]

    net = Configured()
    run = trainer()
    run.fit(net, loader())
    assert isinstance(net.conv, Conv2dQAT)
    assert len(net.losses) == 2 * BATCHES


def test_the_callback_and_the_trained_module_can_be_copied_and_pickled(
    trainer: Callable[..., L.Trainer],
) -> None:
    net, callback = Net(), QATCallback(schedule=SHORT, exporters=["cann"])
    run = trainer(qat())
    run.fit(net, loader())
    x = torch.randn(3, 1, 6, 6)
    wanted = net.eval()(x)
    assert torch.equal(copy.deepcopy(net)(x), wanted)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert (twin.recipe, twin.schedule, twin.exporters) == (
            callback.recipe,
            callback.schedule,
            callback.exporters,
        )
        assert twin.state_dict() == callback.state_dict()


def test_a_prepared_model_works_without_the_callback() -> None:
    net = Net()
    prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for x, y in loader():
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ranges(net)[0][1] > 0


def test_training_without_exporters_is_all_it_does(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    trainer(qat(export_dir=tmp_path / "out")).fit(net, loader())
    assert not (tmp_path / "out").exists()
    assert isinstance(net.conv, Conv2dQAT)


def test_another_recipe_in_a_second_fit_is_reported(trainer: Callable[..., L.Trainer]) -> None:
    net, callback = Net(), qat({"weight": {"bits": 4}})
    trainer(qat()).fit(net, loader())
    trainer(callback).fit(net, loader())
    assert callback.report is not None
    reasons = {layer.name: layer.reason for layer in callback.report.skipped}
    assert "another recipe (weight_quantizer bits=8, not 4" in reasons["conv"]
    # The same recipe is no difference.
    again = qat()
    trainer(again).fit(net, loader())
    assert again.report is not None
    assert {layer.reason for layer in again.report.skipped} == {"already quantized"}
