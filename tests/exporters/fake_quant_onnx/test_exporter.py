"""The QDQ file: explicit quantization that ONNX Runtime and others read."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact, UnsupportedByTarget
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat_exporters import FakeQuantOnnxExporter
from lightning_qat_exporters.onnx_files.run import has_vnni
from lightning_qat_exporters.onnx_files.write import save_onnx
from tests.exporters.contract import ExporterContract, converted
from tests.models import NETWORKS, Nested, ResidualAdd, inputs_for, trained

# One worker converts and translates the networks, for test_onnx_int4 too.
pytestmark = pytest.mark.xdist_group("onnx")

COMPUTE = ("Conv", "Gemm", "MatMul")


def written(model: QuantizedModel, folder: Path, **options: Any) -> onnx.ModelProto:
    return onnx.load(export(model, FakeQuantOnnxExporter(**options), folder / "net").files["model"])


def constants(proto: onnx.ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    return {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}


def steps(model: QuantizedModel, folder: Path, x: Any = None, **options: Any) -> float:
    exporter = FakeQuantOnnxExporter(**options)
    return verify(model, export(model, exporter, folder / "net"), x, exporter).max_steps


class TestContract(ExporterContract):
    name = "fake_quant_onnx"
    make = FakeQuantOnnxExporter

    def break_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(model: ir.Model, path: Path) -> None:
            path.write_bytes(b"half a mod")
            raise OSError("disk full")

        monkeypatch.setattr("lightning_qat_exporters.onnx_files.write.write_streamed", half)

    def names_in(self, artifact: Artifact) -> set[str]:
        proto = onnx.load(artifact.files["model"])
        return {node.name for node in proto.graph.node if node.op_type in COMPUTE}


# The file


@pytest.mark.parametrize(
    ("network", "activation_type", "opset"),
    [
        *((network, "uint8", 20) for network in NETWORKS),
        *(("residual_add", "int8", 20), ("residual_add", "uint8", 18), ("linear_3d", "int8", 21)),
    ],
)
def test_the_file_is_valid(network: str, activation_type: str, opset: int, tmp_path: Path) -> None:
    proto = written(converted(network), tmp_path, activation_type=activation_type, opset=opset)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    names = [node.name for node in proto.graph.node]
    assert all(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_layer_reads_dequantized_integers_on_both_sides(network: str, tmp_path: Path) -> None:
    proto = written(converted(network), tmp_path)
    makers = {output: node for node in proto.graph.node for output in node.output}
    layers = [node for node in proto.graph.node if node.op_type in COMPUTE]
    assert len(layers) == len([k for k in converted(network).tensors if k.endswith(".weight")])
    stored = constants(proto)
    for layer in layers:
        sides = [makers[name] for name in layer.input[:2]]
        assert [side.op_type for side in sides] == ["DequantizeLinear"] * 2
        assert makers[sides[0].input[0]].op_type == "QuantizeLinear"
        assert stored[sides[1].input[0]].dtype == np.int8
    assert not any(node.op_type == "BatchNormalization" for node in proto.graph.node)


def test_no_float_weights_are_stored(tmp_path: Path) -> None:
    stored = constants(written(converted("conv_bn_relu"), tmp_path))
    assert not [name for name, array in stored.items() if array.ndim > 1 and array.dtype != np.int8]


def test_nodes_and_initializers_have_the_names_of_layers(tmp_path: Path) -> None:
    x = inputs_for("residual_add")
    proto = written(convert(trained(ResidualAdd(), x), x), tmp_path)
    layers = {n.name: n.op_type for n in proto.graph.node if n.op_type in COMPUTE}
    assert layers == {"conv1": "Conv", "conv2": "Conv", "head": "Gemm"}
    stored = constants(proto)
    for layer in layers:
        assert {
            *(f"{layer}.input_scale", f"{layer}.input_zero_point"),
            *(f"{layer}.weight_scale", f"{layer}.bias"),
        } <= stored.keys()
        assert f"{layer}.weight" in stored or f"{layer}.weight_transposed" in stored


def test_inputs_and_outputs_keep_the_model_s_names_and_a_batch(tmp_path: Path) -> None:
    values = {"left": torch.randn(4, 6), "right": torch.randn(4, 6)}
    proto = written(convert(trained(Nested(), values), values), tmp_path)

    def shapes(values: Any) -> dict[str, list[Any]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    assert shapes(proto.graph.input) == {"left": ["batch", 6], "right": ["batch", 6]}
    assert shapes(proto.graph.output) == {
        "logits": ["batch", 2],
        "boxes_0": ["batch", 4],
        "boxes_1": ["batch", 4],
    }


def test_an_output_may_be_called_like_an_input(tmp_path: Path) -> None:
    class Echo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"x": self.fc(x)}

    x = torch.randn(4, 3)
    assert steps(convert(trained(Echo(), x), x), tmp_path) <= 1.0


def test_nothing_of_the_exporting_machine_is_in_the_file(tmp_path: Path) -> None:
    proto = written(converted("linear"), tmp_path)
    assert proto.producer_name == "lightning-qat"
    assert str(Path(__file__).parents[3]).encode() not in proto.SerializeToString()
    assert b"stack_trace" not in proto.SerializeToString()


# Integers and types


@pytest.mark.parametrize("network", NETWORKS)
def test_int8_and_uint8_activations_are_the_same_real_numbers(network: str, tmp_path: Path) -> None:
    model, x = converted(network), inputs_for(network).numpy()
    (input_name,) = model.input_names
    outputs = []
    for kind in ("int8", "uint8"):
        exporter = FakeQuantOnnxExporter(activation_type=kind)  # type: ignore[arg-type]
        artifact = export(model, exporter, tmp_path / kind)
        found = exporter.run(artifact, exporter.runtimes[0], {input_name: x})
        outputs.append(found["output"])
    assert np.array_equal(*outputs)


def test_uint8_moves_the_zero_point_up_by_128(tmp_path: Path) -> None:
    model = converted("linear")
    origin = int(model.tensors["0.input"].qparams.zero_point)
    for kind, shift in (("int8", 0), ("uint8", 128)):
        stored = constants(written(model, tmp_path, activation_type=kind))["0.input_zero_point"]
        assert stored.dtype == kind
        assert stored.item() == origin + shift


@pytest.mark.parametrize("activation_type", ["int8", "uint8"])
@pytest.mark.parametrize("network", ["linear", "conv_bn_relu"])
def test_4_bits_are_clipped_integers(network: str, activation_type: str, tmp_path: Path) -> None:
    model = converted(network, "w4a4")
    proto = written(model, tmp_path, activation_type=activation_type)
    onnx.checker.check_model(proto, full_check=True)
    kinds = [node.op_type for node in proto.graph.node if "input" in node.name]
    assert kinds.count("Clip") == kinds.count("QuantizeLinear") > 0
    stored = constants(proto)
    shift = 128 if activation_type == "uint8" else 0
    for key, tensor in model.tensors.items():
        if tensor.integers is None:
            bounds = [stored[f"{key}_{end}"].item() for end in ("qmin", "qmax")]
            assert bounds == [-8 + shift, 7 + shift]
        else:
            array = stored.get(key, stored.get(f"{key}_transposed"))
            assert array is not None
            assert array.dtype == np.int8
            # Eight times 4 bits, so that integer biases have finer steps.
            assert not (array % 8).any()
            assert -64 <= array.min() <= array.max() <= 64
    # 15 steps of 4 bits are 255 of the reported steps: one flipped rounding is 17 of them, times
    # what a weight makes of it. Equal but for such flips.
    exporter = FakeQuantOnnxExporter(activation_type=activation_type)  # type: ignore[arg-type]
    agreement = verify(model, export(model, exporter, tmp_path / "net"), None, exporter)
    assert agreement.runtimes[0].outputs[0].fraction_differing < 0.1


def test_16_bit_activations_are_refused_below_opset_21_and_all_named(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedByTarget,
        match=r"(?s)'fake_quant_onnx' cannot express:\n  0\.input: 16-bit activations need opset "
        r"21; got opset 20\. Use opset=21, or 8-bit activations\n  2\.input: 16-bit",
    ):
        export(converted("linear", "a16w8"), "fake_quant_onnx", tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("network", ["linear_3d", "depthwise"])
def test_16_bit_activations_run_at_opset_21(network: str, tmp_path: Path) -> None:
    model = converted(network, "a16w8")
    proto = written(model, tmp_path, opset=21)
    onnx.checker.check_model(proto, full_check=True)
    stored = constants(proto).items()
    origins = [v for k, v in stored if k.endswith("_zero_point") and "weight" not in k]
    assert {array.dtype for array in origins} == {np.dtype(np.int16)}
    assert steps(model, tmp_path, opset=21) <= 1.0


# Against torch


@pytest.mark.parametrize("recipe", ["w4a8", "amct"])
@pytest.mark.parametrize("network", ["linear_3d", "conv_bn_relu", "residual_add"])
@pytest.mark.filterwarnings("ignore:.*integers of the folded weight saturate:UserWarning")
def test_onnx_runtime_is_at_most_one_step_away(network: str, recipe: str, tmp_path: Path) -> None:
    # Unoptimized: float sums in another order may flip a rounding, which is one step.
    assert steps(converted(network, recipe), tmp_path, inputs_for(network, 32)) <= 1.0


# A matrix product, a grouped convolution, and a network with everything else.
@pytest.mark.parametrize("network", ["linear_3d", "depthwise", "residual_add"])
def test_the_batch_is_dynamic_in_the_file_too(network: str, tmp_path: Path) -> None:
    exporter, model = FakeQuantOnnxExporter(), converted(network, samples=1)
    artifact = export(model, exporter, tmp_path / "net")
    for samples in (1, 3, 300):
        x = inputs_for(network, samples)
        assert verify(model, artifact, x, exporter).max_steps <= 1.0


def test_several_inputs_and_outputs_agree(tmp_path: Path) -> None:
    values = {"left": torch.randn(4, 6), "right": torch.randn(4, 6) * 5}
    assert steps(convert(trained(Nested(), values), values), tmp_path) <= 1.0


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_folded_at_one_of_its_calls_keeps_both_biases(
    norm_first: bool, bias: bool, tmp_path: Path
) -> None:
    class CalledTwice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1, bias=bias)
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.conv(self.bn(y)) if norm_first else self.bn(self.conv(y))

    x = torch.randn(4, 2, 3, 3)
    model = CalledTwice()
    if bias:
        nn.init.uniform_(model.conv.bias, -2.0, -1.0)
    quantized = convert(trained(model, x), x)
    assert steps(quantized, tmp_path) <= 1.0


def test_a_bias_of_zeros_may_be_left_out_of_the_file_and_no_other(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(4, 6)
    nn.init.zeros_(net[0].bias)  # type: ignore[arg-type]
    model, exporter = convert(trained(net, x), x), FakeQuantOnnxExporter()
    artifact = export(model, exporter, tmp_path / "net")
    assert verify(model, artifact).parameters_equal
    proto = onnx.load(artifact.files["model"])
    first, last = (node for node in proto.graph.node if node.op_type == "Gemm")
    assert len(first.input) == 2
    del last.input[2]
    onnx.save(proto, artifact.files["model"])
    assert exporter.differences(model, artifact) == ("2: the file has no bias",)


def test_a_layer_called_twice_stores_its_numbers_once(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    x = torch.randn(4, 3)
    model = convert(trained(Twice(), x), x)
    proto = written(model, tmp_path)
    assert len([a for a in constants(proto).values() if a.ndim == 2]) == 1
    assert [n.name for n in proto.graph.node if n.op_type in COMPUTE] == ["fc", "fc_1"]
    assert steps(model, tmp_path) <= 1.0


# Options


@pytest.mark.parametrize("network", ["depthwise", "residual_add"])
def test_biases_can_be_stored_as_the_accumulator_s_integers(network: str, tmp_path: Path) -> None:
    model = converted(network)
    plain = constants(written(model, tmp_path))
    proto = written(model, tmp_path, quantize_bias=True)
    onnx.checker.check_model(proto, full_check=True)
    stored = constants(proto)
    layers = [node.name for node in proto.graph.node if node.op_type in COMPUTE]
    assert layers
    for layer in layers:
        scale_input = model.tensors[f"{layer}.input"].qparams.scale
        scale_weight = model.tensors[f"{layer}.weight"].qparams.scale
        expected = quantize_bias(
            torch.from_numpy(plain[f"{layer}.bias"].copy()), scale_input, scale_weight
        )
        assert stored[f"{layer}.bias_int32"].dtype == np.int32
        assert np.array_equal(stored[f"{layer}.bias_int32"], expected.numpy())
        step = (scale_input * scale_weight).numpy()
        assert np.array_equal(stored[f"{layer}.bias_int32_scale"], step)
        assert f"{layer}.bias" not in stored
    # Half an accumulator step of bias is nothing beside a step of the output.
    # A step, and float32's rounding of it.
    assert steps(model, tmp_path, quantize_bias=True) <= 1.0 + 1e-5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"activation_type": "int4"}, "activation_type must be 'int8' or 'uint8'; got 'int4'"),
        ({"opset": 17}, "opset must be 18 or newer; got 17"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FakeQuantOnnxExporter(**options)


# Large models


def wide() -> QuantizedModel:
    """Weights of 4 KiB: onnx_ir leaves what is smaller than 256 bytes in the file anyway."""
    x = torch.randn(4, 64)
    return convert(trained(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), x), x)


def test_constants_above_a_size_go_to_a_file_beside(tmp_path: Path) -> None:
    quantized = wide()
    proto = written(quantized, tmp_path)
    path = tmp_path / "big" / "net.onnx"
    save_onnx(ir.from_proto(proto), path, external_above=1000)
    assert {p.name for p in path.parent.iterdir()} == {"net.onnx", "net.onnx.data"}
    assert (path.parent / "net.onnx.data").stat().st_size >= 64 * 64
    assert path.stat().st_size < 64 * 64
    found, expected = constants(onnx.load(path)), constants(proto)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    exporter = FakeQuantOnnxExporter()
    agreement = verify(quantized, Artifact(exporter.name, {"model": path}), exporter=exporter)
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1.0


def test_constants_below_the_size_stay_in_the_file(tmp_path: Path) -> None:
    model = ir.from_proto(written(converted("linear"), tmp_path))
    save_onnx(model, tmp_path / "small" / "net.onnx")
    assert [p.name for p in (tmp_path / "small").iterdir()] == ["net.onnx"]


def test_external_data_is_one_of_the_artifact_s_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A manifest without it would vouch for half of the model.
    monkeypatch.setitem(save_onnx.__kwdefaults__, "external_above", 1000)  # type: ignore[arg-type]
    artifact = export(wide(), "fake_quant_onnx", tmp_path / "net")
    assert set(artifact.files.values()) == set(tmp_path.iterdir())
    assert len(artifact.files) == 2


@pytest.mark.parametrize(
    ("flags", "expected"), [("avx2 fma", False), ("avx2 avx512_vnni", True), ("asimd", True)]
)
def test_vnni_is_read_from_the_cpu_s_flags(tmp_path: Path, flags: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    assert has_vnni(tmp_path / "cpuinfo") is expected
    assert has_vnni(tmp_path / "missing") is True
