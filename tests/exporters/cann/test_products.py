"""Products of Ascend that lack an operator get files without it, of the same values."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from tests.join_networks import train_steps


class Residual(nn.Module):
    """A sum of two quantized tensors, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(F.relu(self.first(x) + x))
        return result


@pytest.fixture(scope="module")
def residual() -> tuple[QuantizedModel, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Residual(), torch.randn(8, 4, 6, 6)
        prepare(model)
        return convert(train_steps(model, x), x), x


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("product", ["Ascend310P", "Ascend310B", "Ascend910"])
def test_a_product_without_antiquant_gets_float_operators_of_the_same_values(
    product: str, residual: tuple[QuantizedModel, Tensor], tmp_path: Path
) -> None:
    model, x = residual
    exporter = CannExporter(product=product)
    artifact = export(model, exporter, tmp_path / "own")
    usual = export(model, CannExporter(), tmp_path / "usual")
    assert "AscendAntiQuant" in operators(usual.files["model"])
    assert "AscendAntiQuant" not in operators(artifact.files["model"])
    inputs = {"x": x.numpy()}
    (expected,) = AscendExecutor(usual.files["model"]).run(inputs)
    (found,) = AscendExecutor(artifact.files["model"]).run(inputs)
    np.testing.assert_array_equal(found, expected)
    agreement = verify(model, artifact, (x,), exporter)
    assert agreement.parameters_equal
    # One step, as a quotient of float32.
    assert agreement.max_steps <= 1.001
    assert not [f for f in exporter.lint(artifact.files["model"]) if f.severity == "error"]
    errors = [f for f in exporter.lint(usual.files["model"]) if f.severity == "error"]
    assert errors
    assert all(f"{product} has no AscendAntiQuant" in str(finding) for finding in errors)


def test_a_product_that_has_all_operators_gets_what_amct_writes(
    residual: tuple[QuantizedModel, Tensor], tmp_path: Path
) -> None:
    model, _ = residual
    files = [
        export(model, CannExporter(product=product), tmp_path / str(product)).files["model"]
        for product in (None, "Ascend910B", "Ascend950")
    ]
    assert len({path.read_bytes() for path in files}) == 1


def test_an_unknown_product_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ValueError, match=r"one of \['Ascend310', .*got 'Ascend311'"):
        CannExporter(product="Ascend311")


def test_activations_of_16_bits_are_noted_and_an_error_of_lint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8)
    prepare(model, "a16w8")
    artifact = export(convert(train_steps(model, x), x), CannExporter(), tmp_path / "wide")
    (note,) = (note for note in artifact.notes if "16 bits" in note)
    assert "AscendQuant is registered for int8 and int4" in note
    findings = CannExporter().lint(artifact.files["model"])
    assert any(f.severity == "error" and "INT16" in str(f) for f in findings)


@pytest.mark.parametrize(("bias", "op_type"), [(True, "Gemm"), (False, "MatMul")])
def test_a_linear_layer_is_the_operator_that_amct_writes(
    bias: bool, op_type: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 4, bias=bias), nn.ReLU(), nn.Linear(4, 2)),
        torch.randn(4, 8),
    )
    prepare(model, "amct")
    quantized = convert(train_steps(model, x), x)
    artifact = export(quantized, CannExporter(), tmp_path / "net")
    (layer,) = (n for n in onnx.load(artifact.files["model"]).graph.node if n.name == "0")
    assert layer.op_type == op_type
    agreement = verify(quantized, artifact, (x,))
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1
