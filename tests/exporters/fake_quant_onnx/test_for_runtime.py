"""``for_runtime``: what a runtime computes otherwise is written otherwise, or refused."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact, UnsupportedByTarget
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import trained

pytestmark = pytest.mark.xdist_group("onnx")


class Branches(nn.Module):
    """Two convolutions side by side, as in Inception and YOLO; takes (batch, 8, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.mix = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(torch.cat([self.left(x), F.relu(self.right(x))], 1))


class Tokens(nn.Module):
    """A class token before the others, and a linear layer over all; takes (batch, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.patches, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.token(x[:, :1]), self.patches(x)], 1))


class Recurrent(nn.Module):
    """Takes (batch, time, 8), or (time, batch, 8)."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 8, batch_first=batch_first)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "branches": (Branches, (16, 8, 6, 6)),
    "tokens": (Tokens, (16, 5, 8)),
    "recurrent": (Recurrent, (16, 2, 8)),
    "time first": (lambda: Recurrent(batch_first=False), (4, 16, 8)),
}


@functools.cache
def model_of(
    name: str, symmetric: bool = False, bits: int = 8, weight_bits: int = 7
) -> tuple[QuantizedModel, Tensor]:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    x = torch.randn(shape)
    recipe = Recipe(
        weight=WeightSpec(bits=weight_bits),
        activation=ActivationSpec(bits=bits, symmetric=symmetric),
    )
    return convert(trained(make(), x, recipe), x), x


def written(model: QuantizedModel, folder: Path, **options: Any) -> Artifact:
    return export(model, FakeQuantOnnxExporter(**options), folder / "net")


def outputs(artifact: Artifact, x: Tensor) -> Any:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = str(artifact.files["model"])
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


# Concatenations for OpenVINO


@pytest.mark.parametrize("name", MODELS)
def test_flat_concatenations_are_the_same_numbers(name: str, tmp_path: Path) -> None:
    model, x = model_of(name)
    plain = written(model, tmp_path / "plain")
    flat = written(model, tmp_path / "flat", for_runtime="openvino")
    assert (outputs(plain, x) == outputs(flat, x)).all()
    assert FakeQuantOnnxExporter(for_runtime="openvino").differences(model, flat) == ()
    proto = onnx.load(flat.files["model"])
    onnx.checker.check_model(proto, full_check=True)
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in onnx.shape_inference.infer_shapes(proto).graph.value_info
    }
    quantized = {n.input[0] for n in proto.graph.node if n.op_type == "QuantizeLinear"}
    joined = [n for n in proto.graph.node if n.op_type == "Concat" and n.output[0] in ranks]
    # A Concat that a pair reads next is over the last axis of what it reads: (batch, all others).
    assert not [n for n in joined if n.output[0] in quantized]
    assert any(n.name.endswith(".flat") for n in joined)


def test_other_concatenations_stay(tmp_path: Path) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.a(x), self.b(x)], -1))

    x = torch.randn(4, 8)
    model = convert(trained(Last(), x), x)
    files = [
        written(model, tmp_path / runtime, for_runtime=runtime).files["model"].read_bytes()
        for runtime in ("onnxruntime", "openvino")
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize(("activation_type", "symmetric"), [("uint8", False), ("int8", True)])
@pytest.mark.parametrize("name", MODELS)
def test_openvino_computes_the_file(
    name: str, activation_type: Any, symmetric: bool, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    model, x = model_of(name, symmetric)
    exporter = FakeQuantOnnxExporter(activation_type, for_runtime="openvino")
    agreement = verify(model, export(model, exporter, tmp_path / "net"), x, exporter)
    (steps,) = [r.max_steps for r in agreement.runtimes if r.runtime == "openvino"]
    assert steps <= 1.0
    assert agreement.remarks == () == agreement.cautions


def test_openvino_s_own_faults_are_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    model, x = model_of("branches")
    exporter = FakeQuantOnnxExporter("int8")
    agreement = verify(model, export(model, exporter, tmp_path / "net"), x, exporter)
    (steps,) = [r.max_steps for r in agreement.runtimes if r.runtime == "openvino"]
    assert steps > 20  # else OpenVINO computes it right now, and nothing needs be said
    (remark,) = agreement.remarks
    assert "convolutions behind a concatenation of int8 tensors" in remark
    model, x = model_of("tokens")
    exporter = FakeQuantOnnxExporter()
    agreement = verify(model, export(model, exporter, tmp_path / "net"), x, exporter)
    assert [r.runtime for r in agreement.runtimes] == list(exporter.runtimes[:2])
    assert agreement.cautions[0].startswith("openvino cannot run the file: [MatMul")
    assert "FakeQuantOnnxExporter(for_runtime='openvino')" in agreement.remarks[0]


# What is refused, before training as well: the trial export raises the same


def refusals(model: QuantizedModel, folder: Path, **options: Any) -> dict[str, str]:
    with pytest.raises(UnsupportedByTarget) as error:
        written(model, folder, **options)
    assert not [*folder.iterdir()]
    return {
        problem.layer: f"{problem.reason}. {problem.remedy}" for problem in error.value.problems
    }


def test_openvino_takes_no_activations_of_16_bits(tmp_path: Path) -> None:
    model, _ = model_of("branches", symmetric=True, bits=16)
    said = refusals(model, tmp_path, opset=21, for_runtime="openvino")
    assert said["mix.input"] == (
        "OpenVINO leaves out activations of 16 bits. "
        "Train with Recipe(activation=ActivationSpec(bits=8))"
    )
    assert len(said) == 3  # the input, the concatenation, the output


def test_tensorrt_takes_zero_points_of_0_alone(tmp_path: Path) -> None:
    model, _ = model_of("branches")
    zero_point = int(model.tensors["mix.input"].qparams.zero_point)
    assert refusals(model, tmp_path, for_runtime="tensorrt")["mix.input"] == (
        f"TensorRT needs zero point 0; got {zero_point}. "
        "Train with Recipe(activation=ActivationSpec(bits=8, symmetric=True))"
    )


def test_tensorrt_takes_8_bits_alone(tmp_path: Path) -> None:
    eight = "Train with Recipe(activation=ActivationSpec(bits=8, symmetric=True))"
    model, _ = model_of("tokens", symmetric=True, bits=16)
    said = refusals(model, tmp_path, opset=21, for_runtime="tensorrt")
    assert set(said.values()) == {f"TensorRT has no 16-bit quantization. {eight}"}
    model, _ = model_of("tokens", symmetric=True, bits=4)
    said = refusals(model, tmp_path, for_runtime="tensorrt")
    assert set(said.values()) == {
        f"TensorRT has no Clip of integers, as -8 .. 7 needs one. {eight}"
    }


def test_the_remedy_for_tensorrt_works(tmp_path: Path) -> None:
    model, _ = model_of("branches", symmetric=True, weight_bits=8)
    proto = onnx.load(written(model, tmp_path, for_runtime="tensorrt").files["model"])
    zero_points = [i for i in proto.graph.initializer if i.name.endswith("zero_point")]
    assert {i.data_type for i in zero_points} == {onnx.TensorProto.INT8}
    assert not any(onnx.numpy_helper.to_array(i).any() for i in zero_points)


@pytest.mark.parametrize("options", [{"activation_type": "uint8"}, {"quantize_bias": True}])
def test_options_that_tensorrt_does_not_read_are_refused(options: dict[str, Any]) -> None:
    text = "for_runtime='tensorrt' needs activation_type='int8' and quantize_bias=False"
    with pytest.raises(ValueError, match=text):
        FakeQuantOnnxExporter(for_runtime="tensorrt", **options)


def test_an_unknown_runtime_is_refused() -> None:
    text = "one of 'onnxruntime', 'openvino', 'tensorrt'; got 'tvm'"
    with pytest.raises(ValueError, match=text):
        FakeQuantOnnxExporter(for_runtime="tvm")  # type: ignore[arg-type]
