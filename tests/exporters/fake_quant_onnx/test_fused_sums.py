"""A residual addition that TensorRT fuses: in the file, in its lint, and in the other targets."""

import functools
from pathlib import Path

import onnx
import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Joins, Recipe
from lightning_qat.recipe.specs import ActivationSpec
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.join_networks import ResNet
from tests.models import trained

pytestmark = pytest.mark.xdist_group("onnx")
TENSORRT = FakeQuantOnnxExporter(for_runtime="tensorrt")


@functools.cache
def model_of(joins: Joins) -> QuantizedModel:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    recipe = Recipe(activation=ActivationSpec(symmetric=True), joins=joins)
    return convert(trained(ResNet(), x, recipe), x, recipe=recipe)


def added(path: Path) -> dict[str, list[str]]:
    """Name of every Add to the operators that give its operands."""
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    return {
        node.name: [makers[name].op_type for name in node.input]
        for node in graph.node
        if node.op_type == "Add"
    }


def test_add_reads_the_convolution_and_the_dequantized_shortcut(tmp_path: Path) -> None:
    model = model_of("fused_sums")
    artifact = export(model, TENSORRT, tmp_path / "net")
    assert added(artifact.files["model"]) == {
        f"blocks.{i}": ["Conv", "DequantizeLinear"] for i in range(3)
    }
    assert TENSORRT.lint(artifact.files["model"]) == ()
    assert (artifact.notes, artifact.differences) == ((), ())
    agreement = verify(model, artifact)
    assert agreement.parameters_equal
    literal = agreement.runtimes[0]
    assert [output.max_steps for output in literal.outputs] == [0]


def test_the_lint_names_the_recipe_that_fuses(tmp_path: Path) -> None:
    artifact = export(model_of(True), TENSORRT, tmp_path / "net")
    found = TENSORRT.lint(artifact.files["model"])
    assert [(finding.severity, finding.node) for finding in found] == [
        ("advice", f"blocks.{i}") for i in range(3)
    ]
    assert all("Recipe(joins='fused_sums')" in finding.remedy for finding in found)


def test_cann_adds_real_values(tmp_path: Path) -> None:
    model = model_of("fused_sums")
    exporter = CannExporter()
    artifact = export(model, exporter, tmp_path / "net")
    assert "error" not in {finding.severity for finding in exporter.lint(artifact.files["model"])}
    assert not [text for text in artifact.differences if text.startswith("add")]
    assert verify(model, artifact).parameters_equal


def test_tflite_notes_the_convolution_in_float(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    artifact = export(model_of("fused_sums"), TFLiteExporter(backend="litert"), tmp_path / "net")
    for i in range(3):
        assert (
            f"blocks.{i}.conv2: computed in float on its integer weight, because its output is not "
            "quantized. A recipe with joins=True and outputs=True quantizes it."
        ) in artifact.notes
