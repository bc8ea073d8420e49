"""Parts that the exported forward does not run, and layers that come after the audit."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_qat.layers import QATLayer
from tests.callback.tiny import Net, loader, qat

EXPORTERS = ("fake_quant_onnx", "cann")
EXAMPLE = torch.zeros(2, 1, 6, 6)


class Distilled(Net):
    """Learns from a frozen teacher that forward never calls."""

    def __init__(self, example: bool = False) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
        self.teacher.requires_grad_(False).eval()
        if example:
            self.example_input_array = EXAMPLE

    def training_step(self, batch: list[Tensor]) -> Tensor:
        wanted = F.softmax(self.teacher(batch[0]), -1)
        return F.cross_entropy(self(batch[0]), wanted)


@pytest.mark.parametrize("example", [True, False], ids=["example inputs", "first batch"])
def test_a_teacher_stays_float_and_out_of_the_files(
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    example: bool,
) -> None:
    caplog.set_level(logging.INFO)
    net = Distilled(example)
    x = torch.randn(4, 1, 6, 6)
    before = net.teacher(x)
    callback = qat(exporters=EXPORTERS, export_dir=tmp_path)
    run = trainer(callback)
    run.fit(net, loader())
    assert torch.equal(net.teacher(x), before)
    assert not any(isinstance(m, QATLayer) for m in net.teacher.modules())
    assert {"teacher.0", "teacher.3"} <= {s.name for s in callback.report.skipped}  # type: ignore[union-attr]
    assert "left float: teacher.0: forward never runs it" in caplog.text
    assert all(result.error is None for result in callback.delivered)
    # Saved and resumed.
    run.save_checkpoint(tmp_path / "net.ckpt")
    again = Distilled(example)
    trainer(qat(), max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "net.ckpt")
    assert not any(isinstance(m, QATLayer) for m in again.teacher.modules())


def test_without_a_plan_a_bystander_is_named_with_the_remedy(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Discriminated(Net):
        def __init__(self) -> None:
            super().__init__()
            self.critic = Net()

    layers_only = {"joins": False, "outputs": False}
    caplog.set_level(logging.INFO)
    trainer(qat(layers_only, exporters=EXPORTERS, export_dir=tmp_path)).fit(
        Discriminated(), loader()
    )
    assert "critic (Net, a LightningModule) is quantized. If forward does not need" in caplog.text
    # A layer that has no range and is not in the graph does not stop the export.
    assert len([*tmp_path.glob("*.onnx")]) >= 2
    # The remedy.
    net = Discriminated()
    trainer(qat({**layers_only, "exclude": ["critic*"]})).fit(net, loader())
    assert not any(isinstance(m, QATLayer) for m in net.critic.modules())


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "training_step"])
def test_a_layer_made_after_the_audit_is_refused_in_the_first_batch(
    trainer: Callable[..., L.Trainer], hook: str
) -> None:
    class Late(Net):
        def make(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.Linear(3, 3)

        def on_fit_start(self) -> None:
            if hook == "on_fit_start":
                self.make()

        def on_train_start(self) -> None:
            if hook == "on_train_start":
                self.make()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            self.make()
            return super().training_step(batch)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return self.late(x) if hasattr(self, "late") else x

    net = Late()
    with pytest.raises(MisconfigurationException, match="made or replaced later: 'late'"):
        trainer(qat()).fit(net, loader())
    assert len(net.losses) <= 1


def test_layers_replaced_at_the_end_are_said_to_be_float_in_the_files(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Merged(Net):
        def on_train_end(self) -> None:
            # As RepVGG merges its branches.
            merged = nn.Conv2d(1, 4, 3, padding=1)
            merged.load_state_dict(copy.deepcopy(self.conv.to_float().state_dict()))  # type: ignore[operator]
            self.conv = merged

    with pytest.warns(UserWarning, match=r"replaced later: 'conv'.* float in the files"):
        trainer(qat(exporters=EXPORTERS[:1], export_dir=tmp_path)).fit(Merged(), loader())


class Decodes(Net):
    """Gives probabilities in eval mode and logits in training."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if self.training else logits * 100


@pytest.mark.parametrize("example", [True, False], ids=["example inputs", "first batch"])
def test_what_evaluation_alone_computes_is_calibrated_and_exported(
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    example: bool,
) -> None:
    caplog.set_level(logging.INFO)
    net = Decodes()
    if example:
        net.example_input_array = EXAMPLE
    callback = qat(exporters=EXPORTERS, export_dir=tmp_path)
    trainer(callback).fit(net, loader(), loader())
    assert all(result.error is None for result in callback.delivered)
    assert "nothing passed through output_0_0 in the first training batch" in caplog.text
    assert "training never computed output_0_0; the range is that of the first" in caplog.text
    x = next(iter(loader()))[0]
    session = ort.InferenceSession(next(tmp_path.glob("*fake_quant*.onnx")))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = net.eval()(x).detach()
    assert float(wanted.abs().max()) > 10
    assert float((torch.from_numpy(found) - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


class Heads(Net):
    """A head that nothing uses, and one that an optional input brings in."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.context = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Any:
        logits = super().forward(x)
        return logits if context is None else logits + self.context(context)


@pytest.mark.parametrize(
    "recipe", ["int8", {"joins": False, "outputs": False}], ids=["plan", "layers only"]
)
def test_layers_that_no_batch_runs_do_not_stop_the_export(
    trainer: Callable[..., L.Trainer], tmp_path: Path, recipe: Any
) -> None:
    callback = qat(recipe, exporters=EXPORTERS, export_dir=tmp_path)
    trainer(callback).fit(Heads(), loader())
    assert [result.error for result in callback.delivered] == [None, None]


def test_a_layer_that_training_skips_at_random_has_a_range_in_the_file(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class LayerDrop(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropped = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            # Never in training: the extreme case of a layer that is dropped at random.
            return x if self.training else x + self.dropped(x)

    net, callback = LayerDrop(), qat(exporters=EXPORTERS, export_dir=tmp_path)
    trainer(callback).fit(net, loader())
    assert [result.error for result in callback.delivered] == [None, None]
    assert net.dropped.input_quantizer.calibrated  # type: ignore[union-attr]


def test_what_training_observes_after_the_first_validation_stays(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class SkippedAtFirst(Net):
        def __init__(self) -> None:
            super().__init__()
            self.dropped = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            # As a layer that is dropped at random may be, for a whole epoch.
            return x if self.training and self.current_epoch == 0 else x + self.dropped(x)

    caplog.set_level(logging.INFO)
    net, counted = SkippedAtFirst(), []

    class Count(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            counted.append(float(net.dropped.input_quantizer.batches))  # type: ignore[arg-type, union-attr]

    callback = qat(exporters=EXPORTERS[:1], export_dir=tmp_path)
    trainer(callback, Count()).fit(net, loader(), loader())
    # One forward in eval mode, and four batches of the second epoch, which the export keeps.
    assert counted == [5.0]
    assert float(net.dropped.input_quantizer.batches) == 5.0  # type: ignore[arg-type, union-attr]
    assert "training never computed" not in caplog.text
