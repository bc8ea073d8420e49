"""What is done once for all targets, and how what it costs grows with the layers."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

from lightning_qat import QuantizedModel, convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import MissingDependency
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.cann import CannExporter
from lightning_qat_exporters.fake_quant_onnx.exporter import FakeQuantOnnxExporter
from lightning_qat_exporters.qdq.translate import translated as translate
from lightning_qat_exporters.tflite import read_back
from lightning_qat_exporters.tflite.flatbuffer import file as tflite_file
from lightning_qat_exporters.tflite.flatbuffer import match_layers
from lightning_qat_exporters.tflite.litert.lowering import Lowered
from tests.models import INPUTS_ONLY, conv_bn_relu, inputs_for, trained


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The class of every module that torch.export captures from now on."""
    classes: list[str] = []
    real = torch.export.export

    def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        classes.append(type(module).__name__)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return classes


@pytest.fixture
def translated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The opset of every call of torch.onnx.export from now on."""
    opsets: list[int] = []
    real = torch.onnx.export

    def counted(*args: Any, **kwargs: Any) -> Any:
        opsets.append(kwargs["opset_version"])
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", counted)
    return opsets


def model() -> QuantizedModel:
    x = inputs_for("conv_bn_relu")
    return convert(trained(conv_bn_relu(), x), x)


def test_one_capture_and_one_translation_serve_all_exports_and_verification(
    captured: list[str], translated: list[int], tmp_path: Path
) -> None:
    exporters = [load_exporter(name) for name in ("fake_quant_onnx", "cann")]
    delivered = export_all(model(), exporters, tmp_path, "net").results
    assert [result.error for result in delivered] == [None, None]
    assert all(result.agreement is not None for result in delivered)
    assert captured == ["Sequential"]
    assert translated == [20]


@pytest.mark.xdist_group("tflite")
def test_tflite_captures_nothing_of_ours_again(captured: list[str], tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    quantized = model()
    (delivered,) = export_all(quantized, [load_exporter("tflite")], tmp_path, "net").results
    assert delivered.error is None
    # litert-torch takes modules only, so it captures the one that it is handed.
    assert captured in (["Sequential"], ["Sequential", "Lowered"])


def test_who_exports_first_does_not_show_in_the_files(tmp_path: Path) -> None:
    quantized = model()
    other = QuantizedModel(quantized.program, quantized.input_names, quantized.output_names)
    for order, exported in (("ab", quantized), ("ba", other)):
        targets = {"a": FakeQuantOnnxExporter(activation_type="uint8"), "b": CannExporter()}
        for letter in order:
            targets[letter].export(exported, tmp_path / order)
    for name in ("qdq", "deploy_model", "fake_quant_model"):
        first, second = (onnx.load(tmp_path / f"{o}_{name}.onnx") for o in ("ab", "ba"))
        assert first == second


def test_each_model_has_its_own_translation(tmp_path: Path, translated: list[int]) -> None:
    for _ in range(2):
        FakeQuantOnnxExporter().export(model(), tmp_path / "net")
    assert translated == [20, 20]


def test_another_opset_is_another_translation(tmp_path: Path, translated: list[int]) -> None:
    quantized = model()
    for opset in (18, 20, 18):
        FakeQuantOnnxExporter(opset=opset).export(quantized, tmp_path / "net")
    assert translated == [18, 20]


def layers(count: int) -> QuantizedModel:
    x = torch.randn(2, 4)
    return convert(trained(nn.Sequential(*(nn.Linear(4, 4) for _ in range(count))), x), x)


def test_torch_is_given_two_constants_per_layer_and_the_scales_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Its export takes time with the square of the constants.
    counts: list[int] = []
    real = torch.onnx.export

    def counted(program: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(program.state_dict))
        return real(program, *args, **kwargs)

    monkeypatch.setattr(torch.onnx, "export", counted)
    models = [layers(count) for count in (2, 6)]
    before = [list(model.program.state_dict) for model in models]
    for model in models:
        translate(model, 20)
    # Integers and a bias per layer; an activation's scale and zero point, a weight's scales.
    assert counts == [2 * 2 + 3, 6 * 2 + 3]
    assert [list(model.program.state_dict) for model in models] == before


def test_litert_torch_is_given_the_constants_that_are_read() -> None:
    pytest.importorskip("litert_torch")
    lowered = Lowered(layers(3), channels_last=True)
    # Weight, its scales, their zero points and the bias of each layer.
    assert len([*lowered.buffers(), *lowered.parameters()]) == 3 * 4


@pytest.mark.xdist_group("tflite")
def test_a_tflite_file_is_read_back_with_one_comparison_per_layer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch")
    weights, grids = list[str](), list[str]()
    same_weight, stored_qparams = match_layers.same_weight, read_back.stored_qparams

    def weighed(file: Any, layer: Any, weight: Any) -> bool:
        weights.append(weight.key)
        return same_weight(file, layer, weight)

    def seen(stored: Any) -> Any:
        grids.append(stored.name)
        return stored_qparams(stored)

    monkeypatch.setattr(match_layers, "same_weight", weighed)
    monkeypatch.setattr(read_back, "stored_qparams", seen)
    quantized, exporter = layers(5), TFLiteExporter(backend="litert")
    artifact = exporter.export(quantized, tmp_path / "net")
    weights.clear()
    assert exporter.differences(quantized, artifact) == ()
    assert weights == [f"{number}.weight" for number in range(5)]
    # In the table of all grids; as it is, and as the output of a hardsigmoid.
    assert max(Counter(grids).values()) <= 3


@pytest.mark.xdist_group("tflite")
@pytest.mark.parametrize("backend", ["litert", "tinynn"])
def test_a_tflite_file_is_unpacked_packed_and_matched_once(
    backend: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    exporter = TFLiteExporter(backend=backend, io="int8")
    try:
        exporter.check_available()
    except MissingDependency as error:
        pytest.skip(str(error))
    calls = list[str]()

    def count(function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return counted

    places = [m for name, m in sys.modules.items() if name.startswith("lightning_qat_exporters.")]
    for function in (tflite_file.unpack, tflite_file.pack, match_layers.match_layers):
        counted = count(function)
        for module in places:
            if vars(module).get(function.__name__) is function:
                monkeypatch.setattr(module, function.__name__, counted)
    model = layers(2)
    artifact = exporter.export(model, tmp_path / "net")
    assert sorted(calls) == ["match_layers", "pack", "unpack"]
    calls.clear()
    # The file on the disk is what is compared with the model.
    assert exporter.differences(model, artifact) == ()
    assert sorted(calls) == ["match_layers", "unpack"]


class Halves(nn.Module):
    """Multiplies one half of its channels with the other."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        return y[:, :2] * y[:, 2:]


def test_onnxscript_s_rule_for_slices_looks_at_slices_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It lists all nodes of the graph for every node that it looks at.
    looked_at: list[str] = []
    real = slice_split_rule.match

    def counted(model: Any, graph: Any, node: Any, **options: Any) -> Any:
        looked_at.append(node.op_type)
        return real(model, graph, node, **options)

    monkeypatch.setattr(slice_split_rule, "match", counted)
    translate(layers(2), 20)
    assert looked_at == []
    x = torch.randn(2, 4)
    translate(convert(trained(Halves(), x, INPUTS_ONLY), x), 20)
    assert set(looked_at) == {"Slice"}
