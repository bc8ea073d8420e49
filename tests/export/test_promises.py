"""What the plan promises on integers, compared with what a file holds."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.callback.loggers import log_agreement
from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.export import export
from lightning_qat.export.promises import broken_promises, promises_of
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.models import ResidualAdd, inputs_for, trained


class Reporting:
    """Writes one small file, and says that it holds some of the tensors as integers."""

    name = "reporting"

    def __init__(self, missing: tuple[str, ...] = (), notes: tuple[str, ...] = ()) -> None:
        self.missing, self.notes = missing, notes

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        path = path_prefix.with_name(f"{path_prefix.name}.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        integers = frozenset(model.tensors) - set(self.missing)
        return Artifact(self.name, {"model": path}, self.notes, integers)


class Silent(Reporting):
    """Does not say what it writes."""

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        artifact = super().export(model, path_prefix)
        return Artifact(artifact.target, artifact.files)


@pytest.fixture
def residual() -> QuantizedModel:
    x = inputs_for("residual_add")
    return convert(trained(ResidualAdd(), x, "int8"), x)


def test_every_layer_and_every_join_is_a_promise(residual: QuantizedModel) -> None:
    # relu(conv1 + bn), relu(conv2 + x), the mean, and the last layer.
    assert [(p.name, p.keys) for p in promises_of(residual)] == [
        ("conv1", ("conv1.weight",)),
        ("conv2", ("conv2.weight",)),
        ("add", ("add_0_0", "conv1.input")),
        ("mean", ("mean_0_0",)),
        ("head", ("head.weight",)),
    ]


def test_a_file_that_holds_everything_has_nothing_to_say(
    residual: QuantizedModel, tmp_path: Path
) -> None:
    for exporter in (Reporting(), FakeQuantOnnxExporter()):
        assert export(residual, exporter, tmp_path / "net").differences == ()


def test_a_layer_that_a_file_lacks_is_named(residual: QuantizedModel, tmp_path: Path) -> None:
    artifact = export(residual, Reporting(missing=("conv2.weight",)), tmp_path / "net")
    assert artifact.differences == ("conv2: planned on integers, computed in float in the file.",)


def test_a_join_that_a_file_lacks_is_named(residual: QuantizedModel, tmp_path: Path) -> None:
    artifact = export(residual, Reporting(missing=("add_0_0", "mean_0_0")), tmp_path / "net")
    assert artifact.differences == (
        "add: 1 planned on integers, computed in float on rounded values (the model's forward).",
        "mean: 1 planned on integers, computed in float on rounded values (the model's forward).",
    )


def test_what_the_exporter_has_explained_is_not_said_again(
    residual: QuantizedModel, tmp_path: Path
) -> None:
    notes = ("conv2: computed in float, because of the weather.",)
    artifact = export(residual, Reporting(("conv2.weight",), notes), tmp_path / "net")
    assert artifact.notes == notes
    assert artifact.differences == broken_promises(residual, artifact) == ()


def test_an_exporter_that_does_not_say_what_it_writes_is_believed(
    residual: QuantizedModel, tmp_path: Path
) -> None:
    assert export(residual, Silent(), tmp_path / "net").differences == ()


def test_differences_are_in_the_manifest_and_on_the_console(
    residual: QuantizedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [result] = export_all(residual, [Reporting(("conv2.weight",))], tmp_path, "net").results
    said = "conv2: planned on integers, computed in float in the file."
    found = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))
    assert found["targets"]["reporting"]["differences"] == [said]
    trainer: Any = None
    with caplog.at_level("INFO", "lightning_utilities"):
        log_agreement(trainer, result)
    assert f"QAT: reporting: {said}" in caplog.messages


class AuxiliaryHead(nn.Module):
    """A head that training alone runs, as Inception's and GoogLeNet's; takes (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aux = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.body(x))
        return (self.head(y), self.aux(y)) if self.training else self.head(y)


def test_what_the_exported_forward_never_reaches_is_named(tmp_path: Path) -> None:
    x = torch.randn(8, 6)
    model = AuxiliaryHead()
    # Without a plan: a plan leaves what is not exported float.
    prepare(model, {"joins": False, "outputs": False})
    for _ in range(3):
        model.train()(x)
    quantized = convert(model.eval(), x)
    assert "aux.weight" in quantized.unreached
    artifact = export(quantized, FakeQuantOnnxExporter(), tmp_path / "net")
    assert (
        "aux.weight: planned, but the exported forward does not reach it, so no file holds it."
        in artifact.differences
    )
    quantized.save(tmp_path / "net.pt2")
    assert QuantizedModel.load(tmp_path / "net.pt2").unreached == quantized.unreached


def test_ascend_computes_joins_in_float_and_says_so(
    residual: QuantizedModel, tmp_path: Path
) -> None:
    differences = export(residual, CannExporter(), tmp_path / "net").differences
    assert [text.partition(",")[0] for text in differences] == [
        "add: 1 planned on integers",
        "mean: 1 planned on integers",
    ]


def test_a_tflite_file_of_integers_alone_keeps_every_promise(
    residual: QuantizedModel, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch")
    artifact = export(residual, TFLiteExporter(backend="litert"), tmp_path / "net")
    assert artifact.integers is not None
    assert artifact.integers >= {"conv1.weight", "conv2.weight", "head.weight", "add_0_0"}
    assert artifact.notes == artifact.differences == ()
