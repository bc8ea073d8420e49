"""Callbacks that average, prune or freeze weights, together with QAT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning, StochasticWeightAveraging
from torch import Tensor, nn

from lightning_qat import QATCallback, Recipe, strip_quantizers
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.layers import Conv2dQAT
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import BATCHES, Net, Planned, loader, qat, ranges, same

averaging = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")

# A remark on memory for modules that shard their layers; the callback's hook on configure_model,
# which lasts for one call, is what it sees.
REMARK = "ignore:You're using the WeightAveraging callback with a model that overrides"


class Weights(L.Callback):
    """Writes down the mean head weight, bias and first range after every batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, tuple[float, float]]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        assert isinstance(pl_module, Net)
        self.seen.append((pl_module.head.weight.detach().clone(), ranges(pl_module)[0]))


@pytest.mark.filterwarnings(REMARK)
def test_ema_averages_weights_and_ranges_and_is_what_is_exported(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net, weights = Planned(), Weights()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", verify=False)
    ema = averaging.EMAWeightAveraging(decay=0.9)
    trainer(callback, ema, weights, max_epochs=3).fit(net, loader(), loader())
    head, high = weights.seen[0][0].clone(), weights.seen[0][1][1]
    for weight, (_, seen) in weights.seen[1:]:
        head, high = 0.9 * head + 0.1 * weight, 0.9 * high + 0.1 * seen
    torch.testing.assert_close(net.head.weight.detach(), head)
    assert ranges(net)[0][1] == pytest.approx(high, rel=1e-5)
    # Flags are not buffers, so no average can turn quantization off.
    assert all(q.calibrated and q.quantizing for q in activation_quantizers(net).values())
    model = QuantizedModel.load(tmp_path / "out" / "planned.pt2")
    x = torch.randn(5, 1, 6, 6)
    torch.testing.assert_close(model(x), net.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings(REMARK)
def test_a_run_with_ema_resumes_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    def fit(epochs: int, path: Path | None = None) -> tuple[Planned, L.Trainer]:
        L.seed_everything(1, verbose=False)
        net = Planned()
        run = trainer(qat(), averaging.EMAWeightAveraging(decay=0.9), max_epochs=epochs)
        run.fit(net, loader(), ckpt_path=path)
        return net, run

    class SaveAt(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    L.seed_everything(1, verbose=False)
    whole = Planned()
    trainer(qat(), averaging.EMAWeightAveraging(decay=0.9), SaveAt(), max_epochs=4).fit(
        whole, loader()
    )
    resumed, _ = fit(4, tmp_path / "1.ckpt")
    assert resumed.losses == whole.losses[2 * BATCHES :]
    assert same(resumed.state_dict(), whole.state_dict())
    stripped = strip_quantizers(torch.load(tmp_path / "1.ckpt", weights_only=True))
    assert set(stripped["current_model_state"]) == set(Planned().state_dict())


def test_ema_needs_to_know_the_tensors_before_it_copies_the_model(
    trainer: Callable[..., L.Trainer],
) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"EMAWeightAveraging copies the model before the first ba"
    ):
        trainer(qat(), averaging.EMAWeightAveraging()).fit(Net(), loader())


@pytest.mark.filterwarnings(REMARK)
def test_ema_of_layers_only_needs_no_example_inputs(trainer: Callable[..., L.Trainer]) -> None:
    net = Net()
    recipe = Recipe(joins=False, outputs=False)
    trainer(qat(recipe), averaging.EMAWeightAveraging()).fit(net, loader())
    assert len(net.losses) == 2 * BATCHES


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "WeightAveraging", "SWA"])
def test_averaging_before_quantization_is_refused_with_the_remedy(
    trainer: Callable[..., L.Trainer], kind: str
) -> None:
    swa = StochasticWeightAveraging(1e-2)
    first = swa if kind == "SWA" else getattr(averaging, kind)()
    name = type(first).__name__
    with pytest.raises(MisconfigurationException, match=rf"Put QATCallback before {name} in the"):
        trainer(first, qat()).fit(Planned(), loader())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:SWA")
def test_swa_averages_and_collects_the_statistics_of_batch_norm_anew(
    trainer: Callable[..., L.Trainer],
) -> None:
    net = Net()
    swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
    trainer(qat(), swa, max_epochs=3).fit(net, loader())
    assert float(net.bn.running_var.mean()) != 1.0  # type: ignore[union-attr]
    assert all(q.calibrated for q in activation_quantizers(net).values())


def test_swa_with_frozen_batch_norm_is_refused(trainer: Callable[..., L.Trainer]) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"frozen batch norms do not. Use Schedule\(freeze_batch"
    ):
        trainer(QATCallback(), StochasticWeightAveraging(1e-2)).fit(Net(), loader())


def test_pruned_weights_stay_pruned_in_the_export(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    pruning = ModelPruning("l1_unstructured", [(net.head, "weight")], amount=0.5)
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, pruning, max_epochs=2).fit(net, loader())
    zeros = int((net.head.weight == 0).sum())
    assert zeros >= net.head.weight.numel() // 2
    model = QuantizedModel.load(tmp_path / "out" / "net.pt2")
    assert int((model.tensors["head.weight"].integers == 0).sum()) >= zeros  # type: ignore[union-attr]


class Backbone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
        del self.conv, self.bn

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(x).relu().mean((2, 3)))
        return logits

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), 0.1)


@pytest.mark.parametrize("unfrozen_at", [2, 9])
def test_backbone_fine_tuning_freezes_and_unfreezes_quantized_layers(
    trainer: Callable[..., L.Trainer], tmp_path: Path, unfrozen_at: int
) -> None:
    net = Backbone()
    before = net.backbone[0].weight.clone()
    tuning = BackboneFinetuning(unfrozen_at, backbone_initial_lr=0.01, train_bn=False)
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, tuning, max_epochs=3).fit(net, loader())
    assert isinstance(net.backbone[0], Conv2dQAT)
    assert torch.equal(net.backbone[0].weight, before) is (unfrozen_at == 9)
    model = QuantizedModel.load(tmp_path / "out" / "backbone.pt2")
    x = torch.randn(5, 1, 6, 6)
    torch.testing.assert_close(model(x), net.eval()(x), rtol=1e-4, atol=1e-5)
