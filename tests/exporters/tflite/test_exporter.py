"""The TFLite file: integers and scales as they are, run by LiteRT."""

import dataclasses
import functools
import logging
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact, MissingDependency, UnsupportedByTarget
from lightning_qat.export.verify import verify
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import TFLiteFile, pack, read, unpack
from lightning_qat_exporters.tflite.litert import backend as _litert
from lightning_qat_exporters.tflite.unsupported import problems_of
from tests.exporters.contract import ExporterContract, converted
from tests.models import Nested, inputs_for, linear, trained

pytest.importorskip("litert_torch")
# One worker pays for the import.
pytestmark = pytest.mark.xdist_group("tflite")


class TestContract(ExporterContract):
    name = "tflite"
    make = TFLiteExporter
    most_steps = 1.0 + 1e-5  # a step, and the rounding of float32

    def break_write(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def half(path: Path, content: bytes) -> None:
            with path.open("wb") as file:
                file.write(content[: len(content) // 2])
            raise OSError("disk full")

        monkeypatch.setattr(Path, "write_bytes", half)

    def names_in(self, artifact: Artifact) -> set[str]:
        file = read(artifact.files["model"].read_bytes())
        return {file.tensors[op.outputs[0]].name for op in file.operators}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@functools.cache
def kept(
    folder: Path, network: str, recipe: str = "int8", **options: Any
) -> tuple[QuantizedModel, Artifact, TFLiteFile]:
    """A converted network, and its files for all tests that only read them."""
    model, place = (
        converted(network, recipe),
        folder / "_".join([network, recipe, *options.values()]),
    )
    return (model, *written(model, place, **options))


def written(model: QuantizedModel, folder: Path, **options: Any) -> tuple[Artifact, TFLiteFile]:
    artifact = export(model, TFLiteExporter(**options), folder / "net")
    return artifact, read(artifact.files["model"].read_bytes())


# The file


def test_inputs_and_outputs_keep_the_model_s_names_in_a_signature(tmp_path: Path) -> None:
    values = {"left": torch.randn(4, 6), "right": torch.randn(4, 6) * 5}
    model = convert(trained(Nested(), values), values)
    artifact, file = written(model, tmp_path)
    assert set(file.inputs) == {"left", "right"}
    assert set(file.outputs) == {"logits", "boxes_0", "boxes_1"}
    assert all(file.tensors[index].name == name for name, index in file.inputs.items())
    agreement = verify(model, artifact, values, TFLiteExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1.0 + 1e-5


def test_the_file_says_who_wrote_it_and_nothing_of_the_machine(folder: Path) -> None:
    _, artifact, file = kept(folder, "conv_bn_relu")
    own = version("lightning-qat")
    assert file.facts == {"version": own, "backend": "litert", "layout": "nhwc"}
    content = artifact.files["model"].read_bytes()
    assert f"Quantized with lightning-qat {own}".encode() in content
    assert str(Path(__file__).parents[3]).encode() not in content


def test_constants_are_aligned_to_16_bytes(folder: Path) -> None:
    # Kernels on devices load them with vector instructions.
    _, artifact, file = kept(folder, "conv_bn_relu")
    content = artifact.files["model"].read_bytes()
    constants = [t.data.tobytes() for t in file.tensors if t.data is not None and t.data.size > 9]
    assert constants
    assert all(content.find(constant) % 16 == 0 for constant in constants)


@pytest.mark.parametrize(
    ("io", "kind", "shift"), [("float", "FLOAT32", 0), ("int8", "INT8", 0), ("uint8", "UINT8", 128)]
)
def test_inputs_and_outputs_have_the_type_that_was_asked_for(
    io: str, kind: str, shift: int, folder: Path
) -> None:
    options = {} if io == "float" else {"io": io}  # the default
    options = {} if io == "float" else {"io": io}
    model, artifact, file = kept(folder, "conv_bn_relu", **options)
    ends = [file.tensors[i] for i in (*file.inputs.values(), *file.outputs.values())]
    assert {tensor.type for tensor in ends} == {kind}
    if io != "float":
        qparams = model.tensors["0.input"].qparams
        assert ends[0].scale.item() == qparams.scale.item()
        assert ends[0].zero_point.item() == qparams.zero_point.item() + shift
    agreement = verify(model, artifact, inputs_for("conv_bn_relu", 16), TFLiteExporter(io=io))  # type: ignore[arg-type]
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1.0 + 1e-5


@pytest.mark.parametrize(("layout", "shape"), [("nhwc", (1, 6, 6, 4)), ("nchw", (1, 4, 6, 6))])
def test_images_have_the_layout_that_was_asked_for(
    layout: str, shape: tuple[int, ...], folder: Path
) -> None:
    options = {} if layout == "nhwc" else {"layout": layout}
    model, artifact, file = kept(folder, "residual_add", **options)
    assert [file.tensors[i].shape for i in file.inputs.values()] == [shape]
    # The file itself says which layout it has.
    assert verify(model, artifact, inputs_for("residual_add", 16)).max_steps <= 1.0 + 1e-5


@pytest.mark.parametrize("recipe", ["w4a4", "a16w8"])
@pytest.mark.parametrize("network", ["linear", "depthwise"])
def test_other_grids_than_8_bits_keep_their_integers(
    network: str, recipe: str, folder: Path
) -> None:
    model, artifact, file = kept(folder, network, recipe)
    agreement = verify(model, artifact, inputs_for(network, 16), TFLiteExporter())
    assert agreement.parameters_equal
    assert file.float_operators == ()
    # A flipped rounding is one step of the output's own grid.
    assert agreement.max_steps <= (17.001 if recipe == "w4a4" else 2.001)


def test_a_bias_of_a_layer_with_16_bit_input_is_int64(folder: Path) -> None:
    _, _, file = kept(folder, "depthwise", "a16w8")
    layers = [op for op in file.operators if "CONV" in op.kind]
    assert [file.tensors[op.inputs[2]].type for op in layers] == ["INT64", "INT64"]


# Read back


def copied(artifact: Artifact, folder: Path) -> tuple[Artifact, Path]:
    """A file to change."""
    path = Path(shutil.copy(artifact.files["model"], folder))
    return dataclasses.replace(artifact, files={"model": path}), path


def test_every_number_that_is_not_the_model_s_is_told(folder: Path, tmp_path: Path) -> None:
    model, original, _ = kept(folder, "residual_add")
    (artifact, path), exporter = copied(original, tmp_path), TFLiteExporter()
    file = unpack(path.read_bytes())
    tensors = {tensor.name.decode(): tensor for tensor in file.subgraphs[0].tensors}
    weight, bias = (file.buffers[tensors[f"conv1.{n}"].buffer] for n in ("weight", "bias"))
    bias.data = np.array(bias.data)
    bias.data[0] ^= 1
    path.write_bytes(pack(file))
    assert exporter.differences(model, artifact) == (
        "conv1: 1 of 4 values of the bias differ from the model's",
    )
    weight.data = np.array(weight.data)
    weight.data[0] ^= 1
    path.write_bytes(pack(file))
    assert exporter.differences(model, artifact)[0] == (
        "conv1: no operator of the file has the integers and scales of its weight"
    )


def test_a_bias_of_zeros_that_the_converter_leaves_out_is_no_difference(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.bias)
    model = convert(trained(nn.Sequential(layer), x, "int8"), x)
    artifact = export(model, TFLiteExporter(backend="litert"), tmp_path / "net")
    assert TFLiteExporter(backend="litert").differences(model, artifact) == ()
    model.layers[0].bias[0] = 1.0  # type: ignore[index]
    assert TFLiteExporter(backend="litert").differences(model, artifact) == (
        "0: the file has no bias for it",
    )


def test_a_grid_that_is_not_the_model_s_is_told(folder: Path, tmp_path: Path) -> None:
    model, original, _ = kept(folder, "conv_bn_relu", io="int8")
    (artifact, path), exporter = copied(original, tmp_path), TFLiteExporter(io="int8")
    file = unpack(path.read_bytes())
    (entry,) = file.signatureDefs[0].inputs
    grid = file.subgraphs[0].tensors[entry.tensorIndex].quantization
    grid.zeroPoint = [int(grid.zeroPoint[0]) + 1]
    path.write_bytes(pack(file))
    assert exporter.differences(model, artifact) == (
        "0: its input has another scale or zero point in the file",
        "0.input: no tensor of the file has its scale and zero point",
        f"the file's tensor 'input' has scale {np.float32(grid.scale).tolist()} and zero point "
        f"{grid.zeroPoint}, which no tensor of the model has",
    )


def test_a_grid_that_litert_prescribes_is_no_difference(tmp_path: Path) -> None:
    # A sigmoid is requantized from 1/256 where the recipe gave its output another grid.
    x = torch.randn(4, 6)
    recipe = Recipe(activation=ActivationSpec(symmetric=True))
    model = convert(trained(nn.Sequential(nn.Linear(6, 5), nn.Sigmoid()), x, recipe), x)
    artifact, file = written(model, tmp_path)
    agreement = verify(model, artifact, torch.randn(32, 6), TFLiteExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 1.0 + 1e-5
    assert file.float_operators == ()


# What has no form


@pytest.mark.parametrize("option", ["backend", "io", "weight_granularity_linear", "layout"])
def test_wrong_options_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be one of \(.*\); got 'other'"):
        TFLiteExporter(**{option: "other"})  # type: ignore[arg-type]


def test_weights_of_linear_layers_per_channel_are_refused_and_all_named(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedByTarget,
        match=r"(?s)'tflite' cannot express:\n  0\.weight: weight_granularity_linear='per_tensor' "
        r"needs one scale for the weight of a Linear; it has 5\. Train with overrides=.*"
        r"\n  2\.weight: weight_granularity_linear",
    ):
        written(converted("linear"), tmp_path, weight_granularity_linear="per_tensor")
    assert not list(tmp_path.iterdir())


def test_weights_of_linear_layers_per_tensor_are_accepted(tmp_path: Path) -> None:
    x = inputs_for("linear")
    recipe = Recipe(overrides={"type:Linear": {"weight": {"granularity": "per_tensor"}}})
    model = convert(trained(linear(), x, recipe), x)
    artifact, file = written(model, tmp_path, weight_granularity_linear="per_tensor")
    weights = [t for t in file.tensors if t.name.endswith(".weight")]
    assert [tensor.scale.size for tensor in weights] == [1, 1]
    assert TFLiteExporter().differences(model, artifact) == ()


def test_weights_of_minus_128_are_computed_and_noted(tmp_path: Path) -> None:
    # AMCT's grid. Inputs at the lower end too, where products are largest.
    x = torch.randn(4, 8, 6, 6)
    layer = nn.Conv2d(8, 4, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.where(layer.weight < 0, -1.0, 0.9))
    recipe = {"weight": {"quantizer": "arq"}}
    model = convert(trained(nn.Sequential(layer), x, recipe), x)
    integers = model.tensors["0.weight"].integers
    assert integers is not None
    assert int((integers == -128).sum()) > 50
    artifact, file = written(model, tmp_path)
    agreement = verify(model, artifact, torch.where(x < 0.5, -100.0, x), TFLiteExporter())
    assert agreement.parameters_equal
    assert all(runtime.max_steps <= 1.001 for runtime in agreement.runtimes)
    assert file.float_operators == ()
    (note,) = artifact.notes
    assert note.startswith("Weights hold -128")
    assert note.endswith("0.weight.")


def test_a_float_layer_keeps_its_weight_in_bytes(tmp_path: Path) -> None:
    # litert-torch's converter writes it as float32.
    x = torch.randn(4, 256)
    recipe = Recipe(joins=False, outputs=False)
    model = convert(trained(nn.Sequential(nn.Linear(256, 256)), x, recipe), x)
    artifact, file = written(model, tmp_path)
    (weight,) = (t for t in file.tensors if t.name == "0.weight")
    assert weight.type == "INT8"
    assert artifact.files["model"].stat().st_size < 1.2 * 256 * 256
    agreement = verify(model, artifact, torch.randn(32, 256), TFLiteExporter())
    assert agreement.parameters_equal
    assert agreement.max_steps <= 0.01


def test_a_file_of_more_than_2_gb_is_refused() -> None:
    (problem,) = problems_of(converted("linear"), linear_per_tensor=False, largest=100)
    assert str(problem.reason).startswith("a file holds at most 100 bytes; the constants are ")


class Divided(nn.Module):
    """No integer target knows a division, so the input stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(1 / (x + 9))
        return result


def test_an_integer_input_of_a_float_operator_is_refused(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    with pytest.raises(UnsupportedByTarget, match="it is read as float, so it cannot be int8"):
        written(convert(trained(Divided(), x), x), tmp_path, io="int8")


def test_a_missing_backend_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_litert, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'lightning-qat\[tflite\]'"):
        TFLiteExporter(backend="litert").check_available()
    monkeypatch.setitem(sys.modules, "lightning_qat_exporters.tflite.tinynn.backend", None)
    with pytest.raises(MissingDependency, match=r"one of two backends.*tinynn.*Or: .*litert"):
        TFLiteExporter().check_available()


def test_a_torch_that_litert_torch_does_not_take_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_litert, "requires", lambda name: ["numpy", "torch<2.0,>=1.0"])
    with pytest.raises(MissingDependency, match=r"needs torch<2\.0,>=1\.0; this is torch 2\."):
        TFLiteExporter(backend="litert").check_available()


# Noise


def test_a_conversion_prints_one_line_and_leaves_logging_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = list(logging.getLogger().handlers)
    written(converted("linear"), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "TFLite: converting with litert-torch\n"
    assert logging.getLogger().handlers == handlers
    assert logging.root.manager.disable == 0
