"""What is there when fit has ended."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_qat import CaptureError, QATCallback, Recipe, Schedule, load_qat_checkpoint
from lightning_qat.export.protocol import Artifact, MissingDependency
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.layers import Conv2dQAT
from tests.callback.tiny import BATCHES, Net, loader, qat


class Failing:
    name = "failing"

    def check_available(self) -> None:
        pass

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        raise OSError("disk full")


def test_fit_leaves_files_and_a_manifest_and_the_live_model_as_it_was(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    net = Net()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=out)
    after: dict[str, Any] = {}

    class Last(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            state = pl_module.state_dict()
            after.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor)})

    run = trainer(callback, Last())
    run.fit(net, loader())
    assert {path.name for path in out.iterdir()} == {
        *("net.pt2", "net_qdq.onnx", "manifest.json", "report.html")
    }
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["targets"]["fake_quant_onnx"]["agreement"]["parameters_equal"] is True
    assert callback.delivered[0].agreement is not None
    assert callback.delivered[0].agreement.max_steps < 1
    for key, value in after.items():
        assert torch.equal(net.state_dict()[key], value)
    assert isinstance(net.conv, Conv2dQAT)
    model = QuantizedModel.load(out / "net.pt2")
    x = torch.randn(5, 1, 6, 6)
    # Batch norm is folded in the file: float32 rounding apart.
    torch.testing.assert_close(model(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_export_from_best_loads_the_best_checkpoint_into_a_copy(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", monitor="val_loss", save_top_k=-1, filename="{epoch}"
    )
    net, out = Net(), tmp_path / "out"
    callback = QATCallback(
        schedule=Schedule(calibration_batches=1),
        exporters=["fake_quant_onnx"],
        export_dir=out,
        export_from="best",
    )
    trainer(callback, checkpoints, enable_checkpointing=True, max_epochs=3).fit(
        net, loader(), loader(seed=1)
    )
    best = load_qat_checkpoint(Net, checkpoints.best_model_path)
    x = torch.randn(5, 1, 6, 6)
    model = QuantizedModel.load(out / "net.pt2")
    torch.testing.assert_close(model(x), best.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_best_checkpoint_from_before_quantization_is_refused(
    trainer: Callable[..., L.Trainer], tmp_path: Path, weights_only: bool
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path / "checkpoints", monitor="early", mode="min", save_weights_only=weights_only
    )

    class EarlyIsBest(Net):
        def validation_step(self, batch: list[Tensor]) -> None:
            self.log("early", float(self.current_epoch))

    callback = QATCallback(
        schedule=Schedule(quantize_from=1, calibration_batches=1),
        exporters=["fake_quant_onnx"],
        export_dir=tmp_path / "out",
        export_from="best",
    )
    with pytest.raises(RuntimeError, match=r"was saved before the network was quantized, so"):
        trainer(callback, checkpoints, enable_checkpointing=True).fit(
            EarlyIsBest(), loader(), loader()
        )


def test_export_from_best_without_a_monitor_is_refused_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", export_from="best")
    net = Net()
    with pytest.raises(
        MisconfigurationException, match=r"got none with a monitor. Add ModelCheckpoint\(monitor="
    ):
        trainer(callback, ModelCheckpoint(tmp_path), enable_checkpointing=True).fit(net, loader())
    assert net.losses == []


def test_a_monitored_best_that_never_appeared_is_named(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", export_from="best")
    checkpoints = ModelCheckpoint(tmp_path / "best", monitor="val_loss", every_n_epochs=5)
    run = trainer(callback, checkpoints, enable_checkpointing=True)
    with pytest.raises(
        RuntimeError, match=r"the monitored 'val_loss' was never saved as one. Log it in validation"
    ):
        run.fit(Net(), loader(), loader())


def test_fast_dev_run_exports_and_leaves_nothing(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, fast_dev_run=True).fit(Net(), loader(), loader())
    assert callback.delivered[0].artifact is not None
    assert callback.delivered[0].error is None
    assert not (tmp_path / "out").exists()


def test_a_failing_exporter_does_not_cost_the_others(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=[Failing(), "fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"1 of 2 exports failed[^\n]*\nfailing: OSError: disk"):
        trainer(callback).fit(Net(), loader())
    assert (tmp_path / "out/net_qdq.onnx").is_file()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["targets"]["failing"]["error"] == "OSError: disk full"


def test_on_export_error_warn_finishes_fit(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=[Failing()], export_dir=tmp_path / "out", on_export_error="warn")
    run = trainer(callback)
    with pytest.warns(UserWarning, match="failing: OSError: disk full"):
        run.fit(Net(), loader())
    assert run.state.finished


def test_two_exporters_of_one_name_are_refused_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    callback = qat(exporters=[Failing(), Failing()], export_dir=tmp_path / "out")
    with pytest.raises(MisconfigurationException, match=r"got \['failing'\] more than once"):
        trainer(callback).fit(net, loader())
    assert net.losses == []


def test_an_untraceable_forward_trains_but_is_refused_for_export_after_the_first_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Branching(Net):
        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                x = x / 2
            return super().forward(x)

    net = Branching()
    trainer(qat()).fit(net, loader())
    assert len(net.losses) == 2 * BATCHES

    net = Branching()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(CaptureError, match=r"could not capture Branching.*if float\(x.sum\(\)\)"):
        trainer(callback).fit(net, loader())
    assert len(net.losses) == 1


def test_unknown_example_inputs_are_an_error_after_the_first_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class AroundForward(Net):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            features = F.relu(self.bn(self.conv(batch[0]))).mean((2, 3))
            loss = F.cross_entropy(self.head(features), batch[1])
            self.losses.append(float(loss.detach()))
            return loss

    net = AroundForward()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    with pytest.raises(MisconfigurationException, match=r"pass QATCallback\(example_inputs=...\)"):
        trainer(callback).fit(net, loader())
    assert len(net.losses) == 1

    net = AroundForward()
    callback = qat(
        Recipe(joins=False),
        exporters=["fake_quant_onnx"],
        export_dir=tmp_path / "out",
        example_inputs=[2, 1, 6, 6],
    )
    with pytest.warns(UserWarning, match="All 2 samples are equal, so they count as one"):
        trainer(callback).fit(net, loader())
    assert (tmp_path / "out/aroundforward_qdq.onnx").is_file()


def test_problems_are_found_before_training_and_named_together(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Unavailable(Failing):
        def check_available(self) -> None:
            raise MissingDependency("Target 'failing' needs the package 'vapor'. pip install vapor")

    class NoForward(Net):
        forward = L.LightningModule.forward

    closest = "No exporter named 'fake_quant_onx'; closest names: 'fake_quant_onnx'"
    with pytest.raises(ValueError, match=closest):
        qat(exporters=["fake_quant_onx", Unavailable()])
    (tmp_path / "file").write_text("not a folder")
    callback = qat(exporters=[Unavailable()], export_dir=tmp_path / "file" / "out")
    # Set later, a name is looked up when fit begins.
    callback.exporters = ("fake_quant_onx", Unavailable())
    net = NoForward()
    with pytest.raises(MisconfigurationException) as caught:
        trainer(callback).fit(net, loader())
    message = str(caught.value)
    assert "No exporter named 'fake_quant_onx'; closest names: 'fake_quant_onnx'" in message
    assert "needs the package 'vapor'. pip install vapor" in message
    assert "NoForward must implement forward(): it is what is exported" in message
    assert "The export directory" in message
    assert "must be writable" in message
    assert net.losses == []


def test_a_best_checkpoint_of_weights_only_is_enough(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "best", monitor="val_loss", save_weights_only=True)
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", export_from="best")
    trainer(callback, checkpoints, enable_checkpointing=True).fit(Net(), loader(), loader())
    assert callback.delivered[0].error is None


def test_last_is_the_live_weights_not_the_last_checkpoint(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    # Written after the second epoch of three, and not after the third.
    checkpoints = ModelCheckpoint(tmp_path / "saved", every_n_epochs=2, save_last=True)
    net = Net()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out")
    trainer(callback, checkpoints, enable_checkpointing=True, max_epochs=3).fit(
        net, loader(), loader()
    )
    stale = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    if stale["epoch"] == 2:
        pytest.skip("before version 2.6 Lightning writes last.ckpt after every epoch")
    assert stale["epoch"] == 1
    x = torch.randn(5, 1, 6, 6)
    model = QuantizedModel.load(tmp_path / "out" / "net.pt2")
    torch.testing.assert_close(model(x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_the_live_model_goes_on_training_after_an_export(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", verify=False)
    trainer(callback, max_epochs=1).fit(net, loader())
    before = net.head.weight.clone()
    trainer(qat(), max_epochs=1).fit(net, loader())
    assert not torch.equal(net.head.weight, before)


def test_every_target_is_written_and_the_manifest_says_which_failed(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(
        exporters=["cann", Failing(), "fake_quant_onnx"],
        export_dir=tmp_path / "out",
        on_export_error="warn",
        verify=False,
    )
    with pytest.warns(UserWarning, match=r"1 of 3 exports failed"):
        trainer(callback, max_epochs=1).fit(Net(), loader())
    targets = json.loads((tmp_path / "out/manifest.json").read_text())["targets"]
    assert targets["failing"] == {"error": "OSError: disk full"}
    for target in ("cann", "fake_quant_onnx"):
        for file in targets[target]["files"].values():
            assert (tmp_path / "out" / file["path"]).is_file()
