"""Every target written, checked, and listed in one manifest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.protocol import Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import inputs_for, linear, trained


class Failing:
    name = "failing"

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        raise UnsupportedByTarget(self.name, (Unsupported("0", "too linear", "Bend it"),))


class Text:
    """An exporter that writes one small file, and whose file cannot be run or read back."""

    name = "text"

    def __init__(self, note: str = "") -> None:
        self.note = note

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        path = path_prefix.with_name(f"{path_prefix.name}_text.txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(model.tensors), encoding="utf-8")
        return Artifact(self.name, {"model": path}, (self.note,) if self.note else ())


class Unverifiable(Text):
    name = "unverifiable"

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        raise OSError("the disk is gone")


@pytest.fixture
def converted() -> QuantizedModel:
    x = inputs_for("linear")
    return convert(trained(linear(), x, "w4a8"), x, recipe=Recipe.load("w4a8"))


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def test_the_manifest_says_what_was_written_from_what(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    results = export_all(
        converted, [Text("Keep dry."), FakeQuantOnnxExporter()], tmp_path, "net"
    ).results
    assert [(r.target, r.error) for r in results] == [("text", None), ("fake_quant_onnx", None)]
    found = manifest(tmp_path)
    assert Recipe.from_dict(found["recipe"]) == Recipe.load("w4a8")
    assert (found["inputs"], found["outputs"]) == (["input"], ["output"])
    assert {"torch", "lightning", "onnx", "onnxruntime", "numpy"} <= found["versions"].keys()
    assert found["targets"].keys() == {"text", "fake_quant_onnx"}
    text = b"0.input 0.weight 2.input 2.weight 2.output_0_0"
    stored = (tmp_path / "net_text.txt").read_bytes()
    assert sorted(stored.split()) == sorted(text.split())
    assert found["targets"]["text"]["files"] == {
        "model": {
            "path": "net_text.txt",
            "bytes": len(text),
            "sha256": hashlib.sha256(stored).hexdigest(),
        }
    }
    assert found["targets"]["text"]["notes"] == ["Keep dry."]
    assert found["targets"]["text"]["agreement"]["parameter_differences"] is None
    agreement = found["targets"]["fake_quant_onnx"]["agreement"]
    assert agreement["parameters_equal"] is True
    assert agreement["samples"] == 4
    assert agreement["runtimes"][0]["outputs"][0]["output"] == "output"


def test_every_file_beside_the_manifest_is_in_it(converted: QuantizedModel, tmp_path: Path) -> None:
    export_all(converted, [Text(), FakeQuantOnnxExporter()], tmp_path, "net")
    listed = {
        file["path"]
        for target in manifest(tmp_path)["targets"].values()
        for file in target["files"].values()
    }
    assert {p.name for p in tmp_path.iterdir()} == {*listed, "net.pt2", "manifest.json"}


def test_a_target_that_fails_does_not_stop_the_others(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    results = export_all(converted, [Failing(), Text()], tmp_path, "net").results
    assert isinstance(results[0].error, UnsupportedByTarget)
    assert results[0].artifact is None
    assert results[1].error is None
    targets = manifest(tmp_path)["targets"]
    assert targets["failing"] == {
        "error": "UnsupportedByTarget: The target 'failing' cannot express:\n"
        "  0: too linear. Bend it"
    }
    assert (tmp_path / "net_text.txt").is_file()


def test_a_check_that_fails_is_an_error_beside_the_files(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    (result,) = export_all(converted, [Unverifiable()], tmp_path, "net").results
    assert isinstance(result.error, OSError)
    assert result.artifact is not None
    entry = manifest(tmp_path)["targets"]["unverifiable"]
    assert entry["error"] == "OSError: the disk is gone"
    assert entry["files"]["model"]["path"] == "net_text.txt"
    assert "agreement" not in entry


def test_checking_can_be_left_out(converted: QuantizedModel, tmp_path: Path) -> None:
    (result,) = export_all(converted, [Unverifiable()], tmp_path, "net", check=False).results
    assert (result.error, result.agreement) == (None, None)


def test_the_inputs_to_check_with_may_be_given(converted: QuantizedModel, tmp_path: Path) -> None:
    x = inputs_for("linear", 9)
    (result,) = export_all(converted, [FakeQuantOnnxExporter()], tmp_path, "net", inputs=x).results
    assert result.agreement is not None
    assert result.agreement.samples == 9


def test_two_targets_of_one_name_do_not_overwrite_each_other(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    # Else the second's file silently takes the place of the first's.
    exporters = [FakeQuantOnnxExporter("uint8"), FakeQuantOnnxExporter("int8")]
    with pytest.raises(ValueError, match="fake_quant_onnx"):
        export_all(converted, exporters, tmp_path, "net")


def test_the_folder_is_made(converted: QuantizedModel, tmp_path: Path) -> None:
    export_all(converted, [Failing()], tmp_path / "a" / "b", "net")
    assert manifest(tmp_path / "a" / "b")["targets"].keys() == {"failing"}


def test_a_later_export_of_the_same_model_adds_to_the_manifest(
    converted: QuantizedModel, tmp_path: Path
) -> None:
    export_all(converted, [Text("first")], tmp_path, "net", training={"phases": []})
    converted.save(tmp_path / "net.pt2")
    loaded = QuantizedModel.load(tmp_path / "net.pt2")
    export_all(loaded, [FakeQuantOnnxExporter()], tmp_path, "net")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["targets"]) == ["text", "fake_quant_onnx"]
    assert manifest["targets"]["text"]["notes"] == ["first"]
    assert manifest["training"] == {"phases": []}
    export_all(loaded, [Text("again")], tmp_path, "net")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["targets"]["text"]["notes"] == ["again"]
    assert set(manifest["targets"]) == {"text", "fake_quant_onnx"}


@pytest.mark.parametrize("earlier", ["another model", "no JSON", "a list"])
def test_a_manifest_of_anything_else_is_replaced(
    earlier: str, converted: QuantizedModel, tmp_path: Path
) -> None:
    if earlier == "another model":
        x = inputs_for("linear")
        other = convert(trained(linear(), x), x)
        assert other.fingerprint != converted.fingerprint
        export_all(other, [FakeQuantOnnxExporter()], tmp_path, "net", check=False)
    else:
        (tmp_path / "manifest.json").write_text("{" if earlier == "no JSON" else "[1]")
    export_all(converted, [Text()], tmp_path, "net")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert list(manifest["targets"]) == ["text"]
