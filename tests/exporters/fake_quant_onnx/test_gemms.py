"""Linear layers of 2-D inputs: on integers in ONNX Runtime, with and without a grid behind them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, export, verify
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import trained


class Gates(nn.Module):
    """A linear layer without a grid behind it, called twice; then one with relu and a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.fc = nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(x).sin()
        x = self.gate(x).cos()
        return self.out(self.fc(x).relu())


def _optimized(path: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.parametrize("activation_type", ["int8", "uint8"])
def test_every_product_is_integer_in_an_optimized_session(
    activation_type: str, tmp_path: Path
) -> None:
    x = torch.rand(16, 8)
    model = convert(trained(Gates(), x), x)
    exporter = FakeQuantOnnxExporter(activation_type=activation_type)  # type: ignore[arg-type]
    artifact = export(model, exporter, tmp_path / "net")
    operators = _optimized(artifact.files["model"])
    assert operators["MatMulIntegerToFloat"] == 2
    assert operators["QGemm"] + operators["QLinearMatMul"] == 2
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(operators)
    agreement = verify(model, artifact)
    assert agreement.parameter_differences == ()
    assert agreement.runtimes[0].max_steps <= 1.0
    # Both calls multiply with one stored weight.
    graph = onnx.load(artifact.files["model"]).graph
    assert [i.name for i in graph.initializer if i.name.startswith("gate.weight")].count(
        "gate.weight_transposed"
    ) == 1
    assert {"gate", "gate_1", "fc", "out"} <= {node.name for node in graph.node}


def test_integer_biases_keep_their_gemms(tmp_path: Path) -> None:
    x = torch.rand(16, 8)
    model = convert(trained(Gates(), x), x)
    artifact = export(model, FakeQuantOnnxExporter(quantize_bias=True), tmp_path / "net")
    graph = onnx.load(artifact.files["model"]).graph
    assert Counter(n.op_type for n in graph.node)["Gemm"] == 4
