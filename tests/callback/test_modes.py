"""Modules in eval mode while a Trainer trains: frozen backbones, and modules left in eval mode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net, Planned, loader, qat, ranges

EXPORTERS = ("fake_quant_onnx", "cann")


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        return F.relu(self.conv2(x)) + x


class FineTuned(Net):
    """A backbone that never trains, in eval mode as ``from_pretrained`` gives it, and a head."""

    def __init__(self, *, frozen: bool = True, normed: bool = False) -> None:
        super().__init__()
        del self.conv, self.bn
        self.backbone = Backbone()
        self.backbone.requires_grad_(False)
        self.norm = nn.BatchNorm2d(4) if normed else nn.Identity()
        if frozen:
            self.backbone.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.backbone(x)).mean((2, 3)))
        return logits


def widening() -> DataLoader[Any]:
    """Batches that are four times as wide from the second one on."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 6, 6, generator=generator)
    x[8:] *= 4
    y = torch.randint(0, 3, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize("planned", [True, False], ids=["example inputs", "first batch"])
def test_a_frozen_backbones_ranges_are_those_of_the_same_net_in_train_mode(
    trainer: Callable[..., L.Trainer], tmp_path: Path, planned: bool
) -> None:
    def fit(frozen: bool) -> FineTuned:
        L.seed_everything(1, verbose=False)
        net = FineTuned(frozen=frozen)
        if planned:
            net.example_input_array = torch.zeros(2, 1, 6, 6)
        folder = tmp_path / str(frozen)
        trainer(qat(exporters=EXPORTERS, export_dir=folder)).fit(net, widening(), loader())
        return net

    frozen, in_train_mode = fit(True), fit(False)
    assert ranges(frozen) == ranges(in_train_mode)
    assert not frozen.backbone.conv1.training
    # The files are those of the data: the first range reaches over the first batch's.
    first, rest = (float(x.abs().max()) for x in widening().dataset.tensors[0].split([8, 24]))  # type: ignore[attr-defined]
    assert 1.5 * first < float(frozen.backbone.conv1.input_quantizer.max_val) < rest  # type: ignore[arg-type, union-attr]
    x = next(iter(widening()))[0]
    session = ort.InferenceSession(next((tmp_path / "True").glob("*fake_quant*.onnx")))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.allclose(torch.from_numpy(found), frozen.eval()(x), atol=0.05)


def test_batch_norm_and_dropout_keep_the_users_mode(trainer: Callable[..., L.Trainer]) -> None:
    net = FineTuned(normed=True)
    net.norm.eval()
    trainer(qat()).fit(net, widening())
    assert int(net.norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    assert not net.norm.training
    assert net.head.training


def test_a_module_wholly_in_eval_mode_trains_and_is_told_of_lightnings_rule(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def fit(eval_mode: bool) -> FineTuned:
        L.seed_everything(1, verbose=False)
        net = FineTuned(frozen=False)
        trainer(qat(exporters=EXPORTERS, export_dir=tmp_path / str(eval_mode))).fit(
            net.train(not eval_mode), widening(), loader(scale=100)
        )
        return net

    with pytest.warns(UserWarning, match="Every layer of FineTuned is in eval mode"):
        in_eval = fit(True)
    assert ranges(in_eval) == ranges(fit(False))
    assert {p.name for p in tmp_path.glob("True/*")} == {p.name for p in tmp_path.glob("False/*")}


def test_an_inner_network_wholly_in_eval_mode_is_told_too(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Wrapped(Net):
        def __init__(self) -> None:
            super().__init__()
            del self.conv, self.bn, self.head
            self.inner = Net().eval()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.inner(x)
            return logits

    with pytest.warns(UserWarning, match=r"call model.train\(\) before trainer.fit"):
        trainer(qat()).fit(Wrapped(), loader())


def test_what_a_training_step_evaluates_is_not_observed(trainer: Callable[..., L.Trainer]) -> None:
    class PseudoLabels(Planned):
        """Labels far wider data with its own predictions, in eval mode, in every step."""

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.eval()
            with torch.no_grad():
                self(batch[0] * 100)
            self.train()
            return super().training_step(batch)

        def on_train_batch_end(self, *args: Any) -> None:
            # Between batches nothing is observed, whatever the mode.
            self(torch.full((2, 1, 6, 6), 1000.0))

    net = PseudoLabels()
    trainer(qat()).fit(net, loader())
    highs = [float(x.max()) for x, _ in loader()]
    assert ranges(net)[0][1] <= max(highs)


def test_after_fit_nobody_holds_the_model(trainer: Callable[..., L.Trainer]) -> None:
    net = Planned()
    trainer(qat()).fit(net, loader())
    assert all(q.gate is None for q in activation_quantizers(net).values())
