"""What a target cannot express is said before training, or after its first batch, for all."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.export.protocol import Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.callback import tiny
from tests.callback.tiny import BATCHES, Net, loader, same

qat = partial(tiny.qat, trial_export=True)


class Toy:
    """A target with a list of what it lacks; counts its exports."""

    def __init__(self, name: str, *lacks: str) -> None:
        self.name, self.lacks = name, lacks
        self.models: list[QuantizedModel] = []

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        self.models.append(model)
        if self.lacks:
            problems = [
                Unsupported(what, "it has no form here", "Exclude it") for what in self.lacks
            ]
            raise UnsupportedByTarget(self.name, problems)
        path = path_prefix.with_name(f"{path_prefix.name}.toy")
        path.write_text("toy")
        return Artifact(self.name, {"model": path})


class Known(Net):
    """Has example inputs, so that everything is tried before the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(8, 1, 6, 6)


@pytest.mark.parametrize(("net", "batches"), [(Known, 0), (Net, 1)], ids=["known", "recorded"])
def test_all_targets_problems_are_told_together(
    trainer: Callable[..., L.Trainer], tmp_path: Path, net: type[Net], batches: int
) -> None:
    module = net()
    targets = [Toy("one", "conv"), Toy("two"), Toy("three", "head", "bn")]
    with pytest.raises(RuntimeError) as caught:
        trainer(qat(exporters=targets, export_dir=tmp_path)).fit(module, loader())
    assert len(module.losses) == batches
    message = str(caught.value)
    assert "2 of 3 exports failed on the untrained model, and would fail after training" in message
    for line in ("conv: it has no form here. Exclude it", "head: it has", "bn: it has"):
        assert line in message
    assert list(tmp_path.iterdir()) == []


def test_warn_trains_all_the_same(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    module = Known()
    callback = qat(exporters=[Toy("one", "conv")], export_dir=tmp_path, on_export_error="warn")
    with pytest.warns(UserWarning, match="conv: it has no form here") as seen:
        trainer(callback, max_epochs=1).fit(module, loader())
    assert len(module.losses) == BATCHES
    texts = [str(warning.message) for warning in seen if "QAT" in str(warning.message)]
    assert ["the export at the end of training will fail" in text for text in texts] == [
        True,
        False,
    ]


def test_a_trial_runs_once_and_changes_nothing(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    runs: dict[bool, tuple[list[float], Any]] = {}
    for trial in (True, False):
        torch.manual_seed(3)
        module, target = Known(), Toy("toy")
        callback = qat(exporters=[target], export_dir=tmp_path / str(trial), trial_export=trial)
        trainer(callback).fit(module, loader())
        assert len(target.models) == 1 + trial
        runs[trial] = module.losses, (module.state_dict(), torch.random.get_rng_state())
    assert runs[True][0] == runs[False][0]
    assert same(runs[True][1], runs[False][1])


def test_a_trial_has_the_graph_of_the_export_with_made_up_ranges(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    target = Toy("toy")
    trainer(qat(exporters=[target], export_dir=tmp_path), max_epochs=1).fit(Known(), loader())
    before, after = target.models
    assert [n.target for n in before.program.graph.nodes] == [
        n.target for n in after.program.graph.nodes
    ]
    assert before.tensors.keys() == after.tensors.keys()
    # -1 to 1 on 255 steps.
    assert float(before.tensors["conv.input"].qparams.scale) == pytest.approx(2 / 255)


def test_tensorrt_s_need_is_told_before_training_and_its_remedy_trains(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    """A range that is not known yet is -1 to 1: its zero point is -1, so that it shows."""
    module, target = Known(), FakeQuantOnnxExporter(for_runtime="tensorrt")
    remedy = Recipe(activation=ActivationSpec(bits=8, symmetric=True))
    text = r"conv\.input: TensorRT needs zero point 0; got -1\. Train with Recipe\(activation="
    with pytest.raises(RuntimeError, match=text + r"ActivationSpec\(bits=8, symmetric=True\)\)"):
        trainer(qat(exporters=[target], export_dir=tmp_path)).fit(module, loader())
    assert module.losses == []
    callback = qat(remedy, exporters=[target], export_dir=tmp_path)
    trainer(callback, max_epochs=1).fit(Known(), loader())
    (result,) = callback.delivered
    assert result.artifact is not None
    assert not [f for f in target.lint(result.artifact.files["model"]) if f.severity == "error"]


def test_a_real_target_says_what_it_lacks_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class Wide(Known):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(super().forward(x)).abs()

        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = self(batch[0]).sum()
            self.losses.append(float(loss.detach()))
            return loss

    module = Wide()
    with pytest.raises(RuntimeError, match=r"(?s)1 of 1 exports failed on the untrained.*cann: "):
        trainer(qat(exporters=["cann"], export_dir=tmp_path)).fit(module, loader())
    assert module.losses == []


class Labelled(Net):
    """As Hugging Face's models: the loss is computed in forward."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:  # type: ignore[override]
        logits = self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return self(batch[0], labels=batch[1])["loss"]


def test_chosen_outputs_leave_out_the_labels(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(
        exporters=["fake_quant_onnx", "cann"], export_dir=tmp_path, export_outputs=["logits"]
    )
    trainer(callback, max_epochs=1).fit(Labelled(), loader())
    model = QuantizedModel.load(tmp_path / "labelled.pt2")
    assert (model.input_names, model.output_names) == (("x",), ("logits",))
    for delivered in callback.delivered:
        assert delivered.agreement is not None
        assert delivered.agreement.samples == 8
        assert delivered.agreement.runtimes[0].max_steps < 2


def test_a_loss_among_the_outputs_is_named_with_its_labels(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=[Toy("toy", "loss")], export_dir=tmp_path)
    with pytest.raises(
        RuntimeError,
        match=r"for that alone the files take 'labels', as a loss takes labels. Export what a "
        r"device needs: QATCallback\(export_outputs=\['logits'\]\)",
    ):
        trainer(callback).fit(Labelled(), loader())


def test_an_output_that_does_not_exist_is_an_error_after_the_first_batch(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    callback = qat(exporters=[Toy("toy")], export_dir=tmp_path, export_outputs=["logit"])
    with pytest.raises(ValueError, match=r"got 'logit', closest names: 'logits'. It returns \['l"):
        trainer(callback).fit(Labelled(), loader())
    with pytest.raises(ValueError, match=r"Write export_outputs=\['logits'\]"):
        qat(export_outputs="logits")


def test_zero_initialised_layers_pass_a_trial(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    module = Known()
    nn.init.zeros_(module.bn.weight)
    nn.init.zeros_(module.head.weight)
    target = Toy("toy")
    callback = qat(exporters=[target, "cann"], export_dir=tmp_path, verify=False)
    trainer(callback, max_epochs=1).fit(module, loader())
    assert len(target.models) == 2


SATURATES = "fake_quant_onnx: on x86 CPUs without VNNI, ONNX Runtime may saturate products"
FEW_BITS = "fake_quant_onnx: weights of 4 bits take 8 bits in the file"


@pytest.mark.parametrize(
    ("recipe", "options", "caution", "said"),
    [
        pytest.param(Recipe(), {}, SATURATES, 1, id="8 bits"),
        pytest.param(Recipe(weight=WeightSpec(bits=7)), {}, SATURATES, 0, id="7 bits"),
        pytest.param(Recipe(weight=WeightSpec(bits=4)), {}, SATURATES, 0, id="4 bits"),
        # 15 * 127 * 2 fits 16 bits.
        pytest.param(
            Recipe(activation=ActivationSpec(bits=4)), {}, SATURATES, 0, id="4-bit inputs"
        ),
        pytest.param(Recipe(), {"for_runtime": "openvino"}, SATURATES, 0, id="OpenVINO"),
        pytest.param(
            Recipe(activation=ActivationSpec(symmetric=True)),
            {"for_runtime": "tensorrt"},
            SATURATES,
            0,
            id="TensorRT",
        ),
        pytest.param(Recipe(weight=WeightSpec(bits=4)), {}, FEW_BITS, 1, id="bits of the file"),
    ],
)
@pytest.mark.parametrize("trial", [True, False], ids=["trial", "no trial"])
def test_what_is_better_decided_before_training_is_said_once_before_it(
    trainer: Callable[..., L.Trainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    recipe: Recipe,
    options: dict[str, Any],
    caution: str,
    said: int,
    trial: bool,
) -> None:
    class Said(Known):
        def training_step(self, batch: Any) -> Tensor:
            counts.append(sum(caution in record.getMessage() for record in caplog.records))
            return super().training_step(batch)

    counts: list[int] = []
    callback = qat(
        recipe, exporters=[FakeQuantOnnxExporter(**options)], export_dir=tmp_path,
        trial_export=trial, verify=False,
    )  # fmt: skip
    with caplog.at_level("INFO"):
        trainer(callback, max_epochs=1).fit(Said(), loader())
    assert {*counts} == {said}
    assert sum(caution in record.getMessage() for record in caplog.records) == said
