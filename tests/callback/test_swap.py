"""Layers become QAT layers wherever they are made, and stay the same objects."""

from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qat.layers import Conv2dQAT, LinearQAT
from tests.callback.tiny import BATCHES, Net, loader, qat, ranges


class FromSetup(Net):
    def __init__(self) -> None:
        super().__init__()
        self.late: nn.Module

    def setup(self, stage: str) -> None:
        self.late = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.late(super().forward(x))
        return logits


class FromConfigureModel(FromSetup):
    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.late = nn.Linear(3, 3)


class FromIdempotentConfigureModel(FromConfigureModel):
    def configure_model(self) -> None:
        if not hasattr(self, "late"):
            super().configure_model()


@pytest.mark.parametrize("kind", [FromSetup, FromConfigureModel, FromIdempotentConfigureModel])
def test_layers_made_late_are_quantized_trained_and_resumed(
    trainer: Callable[..., L.Trainer], tmp_path: Path, kind: type[Net]
) -> None:
    net = kind()
    callback = qat()
    run = trainer(callback)
    run.fit(net, loader())
    assert isinstance(net.late, LinearQAT)
    assert callback.report is not None
    assert [layer.name for layer in callback.report.swapped] == ["conv", "head", "late"]
    trained = {p for group in run.optimizers[0].param_groups for p in group["params"]}
    assert set(net.parameters()) == trained
    assert "configure_model" not in vars(net)

    run.save_checkpoint(tmp_path / "late.ckpt")
    again = kind()
    trainer(qat(), max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "late.ckpt")
    assert isinstance(again.late, LinearQAT)


def test_a_layer_made_in_on_fit_start_is_an_error(trainer: Callable[..., L.Trainer]) -> None:
    class TooLate(Net):
        pass

    class Replace(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            pl_module.head = nn.Linear(4, 3)

    with pytest.raises(
        MisconfigurationException,
        match=r"must exist when training is set up.*'head'. Make layers in __init__",
    ):
        trainer(Replace(), qat()).fit(TooLate(), loader())


def test_aliases_and_stored_parameters_stay_the_same_objects(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Aliased(Net):
        def __init__(self) -> None:
            super().__init__()
            self.same_head = self.head
            self.in_a_list = [self.conv]
            self.own = list(self.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.own, 0.1)

    net = Aliased()
    before = net.head.weight.clone()
    callback = qat()
    trainer(callback).fit(net, loader())
    assert net.same_head is net.head
    assert net.in_a_list[0] is net.conv
    assert isinstance(net.conv, Conv2dQAT)
    assert not torch.equal(net.head.weight, before)
    assert callback.report is not None
    assert callback.report.swapped[1].aliases == ("same_head",)


def test_every_parameter_is_in_the_optimizer_before_training(
    trainer: Callable[..., L.Trainer],
) -> None:
    class InPlaces(FromConfigureModel):
        """Layers from __init__, setup and configure_model."""

        def setup(self, stage: str) -> None:
            self.second = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.second(super().forward(x))
            return logits

    net, run = InPlaces(), trainer(qat())
    run.fit(net, loader())
    groups = run.optimizers[0].param_groups
    assert {p for group in groups for p in group["params"]} == set(net.parameters())
    assert {type(net.conv), type(net.second), type(net.late)} == {Conv2dQAT, LinearQAT}


def test_tied_weights_stay_tied_and_share_a_quantizer(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.two(self.one(super().forward(x)))
            return logits

    net, callback = Tied(), qat()
    trainer(callback).fit(net, loader())
    assert net.one.weight is net.two.weight
    assert type(net.one) is type(net.two) is LinearQAT
    assert net.one.weight_quantizer is net.two.weight_quantizer
    assert callback.report is not None
    assert callback.report.skipped == ()


def test_parametrized_layers_are_quantized_and_train_their_own_parameters(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Parametrized(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.utils.parametrizations.weight_norm(self.head)

    net, callback = Parametrized(), qat()
    length = net.head.parametrizations.weight.original0.detach().clone()
    trainer(callback).fit(net, loader())
    assert isinstance(net.head, LinearQAT)
    assert callback.report is not None
    assert "head" in {layer.name for layer in callback.report.swapped}
    assert not torch.equal(net.head.parametrizations.weight.original0, length)


def test_hooks_and_plain_lists_of_layers_go_on_working(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Listed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.steps = [self.conv, self.bn]
            self.calls = 0
            self.conv.register_forward_hook(self.count)

        def count(self, *args: object) -> None:
            self.calls += 1

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            logits: Tensor = self.head(F.relu(x).mean((2, 3)))
            return logits

    net = Listed()
    trainer(qat()).fit(net, loader())
    assert isinstance(net.steps[0], Conv2dQAT)
    # And once in eval mode, for the plan.
    assert net.calls == 2 * BATCHES + 1
    assert ranges(net)[0] != (0.0, 0.0)
