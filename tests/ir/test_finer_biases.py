"""Weights of few bits on a finer grid: the same function, and biases of integer targets on it."""

from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_qat import Recipe, WeightSpec, convert, export, verify
from lightning_qat.ir.finer_biases import with_finer_biases
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.models import EVERY_LAYER, NETWORKS, inputs_for, trained


def of_bits(bits: int, network: str = "conv_bn_relu") -> tuple[QuantizedModel, Tensor]:
    x = inputs_for(network)
    model = trained(NETWORKS[network][0](), x, Recipe(weight=WeightSpec(bits=bits)))
    return convert(model, x), x


def bias_errors(model: QuantizedModel) -> list[float]:
    """How far rounding moves each layer's bias at most."""
    found = []
    for layer in model.layers:
        assert layer.bias is not None
        scales = [model.tensors[key].qparams.scale for key in (layer.input_key, layer.weight_key)]
        steps = quantize_bias(layer.bias, *scales).double()
        found.append(float((steps * (scales[0] * scales[1]).double() - layer.bias).abs().max()))
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", [2, 3, 4, 7])
def test_the_function_is_the_same_to_the_bit(network: str, bits: int) -> None:
    model, x = of_bits(bits, network)
    finer = with_finer_biases(model)
    for given, wanted in zip(
        finer.flat_outputs(finer(x)).values(), model.flat_outputs(model(x)).values(), strict=True
    ):
        assert torch.equal(given, wanted)
    for key, tensor in model.tensors.items():
        if tensor.integers is not None:
            integers, scale = finer.tensors[key].integers, finer.tensors[key].qparams.scale
            assert integers is not None
            factor = tensor.qparams.scale / scale
            assert torch.equal(factor, factor.log2().round().exp2())
            assert int(integers.abs().max()) <= max(64, int(tensor.integers.abs().max()))


# The largest integers of the grids are 2, 4 and 8 below zero, 64 is the most that they may become.
@pytest.mark.parametrize(("bits", "finer"), [(2, 32), (3, 16), (4, 8)])
def test_a_bias_has_as_many_times_more_steps_as_the_weight_leaves_room(
    bits: int, finer: int
) -> None:
    model, _ = of_bits(bits)
    changed = with_finer_biases(model)
    for layer in model.layers:
        before, after = (m.tensors[layer.weight_key] for m in (model, changed))
        assert before.integers is not None
        if int(before.integers.abs().max()) == 2 ** (bits - 1):
            assert torch.equal(before.qparams.scale, after.qparams.scale * finer)
    for coarse, fine in zip(bias_errors(model), bias_errors(changed), strict=True):
        assert fine < coarse / (finer / 4)


def test_weights_of_8_bits_and_those_to_be_kept_stay_as_they_are() -> None:
    model, _ = of_bits(8)
    assert with_finer_biases(model) is model
    model, _ = of_bits(4, "linear")
    assert with_finer_biases(model, keep=IntegerGrid(-8, 7)) is model
    assert with_finer_biases(model) is not model


class Plain(nn.Module):
    """A weight without a bias, and one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(6, 6, bias=False)
        self.with_bias = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.with_bias(self.plain(x).relu())


def test_a_weight_without_a_bias_stays_as_it_is() -> None:
    x = torch.randn(4, 6)
    model = convert(trained(Plain(), x, EVERY_LAYER["w4a4"]), x)
    finer = with_finer_biases(model)
    scale = {k: (model.tensors[k].qparams.scale, t.qparams.scale) for k, t in finer.tensors.items()}
    assert torch.equal(*scale["plain.weight"])
    before, after = scale["with_bias.weight"]
    assert torch.equal(before, after * 8)


def test_a_weight_of_zeros_stays_one_of_8_bits() -> None:
    linear, x = nn.Linear(6, 4), torch.randn(4, 6)
    nn.init.zeros_(linear.weight)
    finer = with_finer_biases(convert(trained(linear, x), x))
    (layer,) = finer.layers
    assert finer.tensors[layer.weight_key].qparams.grid.dtype is torch.int8


def test_a_bias_that_would_leave_int32_keeps_its_steps() -> None:
    linear = nn.Linear(6, 4)
    with torch.no_grad():
        linear.weight.mul_(1e-9)
        linear.bias.fill_(1.0)
    x = torch.randn(4, 6)
    with pytest.warns(UserWarning, match="biases would not fit int32"):
        model = convert(trained(linear, x, EVERY_LAYER["w4a4"]), x)
    for finer in (model, with_finer_biases(model)):
        (layer,) = finer.layers
        scales = [finer.tensors[key].qparams.scale for key in (layer.input_key, layer.weight_key)]
        assert layer.bias is not None
        assert int(quantize_bias(layer.bias, *scales).abs().max()) < 2**31


EXPORTERS = {
    "onnx": FakeQuantOnnxExporter(quantize_bias=True),
    "cann": CannExporter(),
    "tflite": TFLiteExporter(),
}


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_files_have_the_numbers_and_agree(bits: int, target: str, tmp_path: Path) -> None:
    model, x = of_bits(bits)
    exporter = EXPORTERS[target]
    agreement = verify(model, export(model, exporter, tmp_path / "net"), (x,), exporter)
    assert agreement.parameters_equal
    # With biases on the coarse grid of 2 bits a third of the outputs is a step away.
    assert agreement.runtimes[0].outputs[0].fraction_differing < 0.05


def test_biases_of_a_deploy_model_may_stay_as_they_were_trained(tmp_path: Path) -> None:
    x = inputs_for("conv_bn_relu")
    model = convert(trained(NETWORKS["conv_bn_relu"][0](), x, EVERY_LAYER["w4a4"]), x)
    exporter = CannExporter(float_bias=True)
    artifact = export(model, exporter, tmp_path / "net")
    agreement = verify(model, artifact, (torch.randn(64, *x.shape[1:]),), exporter)
    assert agreement.parameters_equal
    assert all(o.fraction_differing == 0 for runtime in agreement.runtimes for o in runtime.outputs)


def test_a_float_bias_of_a_deploy_model_is_read_back(tmp_path: Path) -> None:
    model, _ = of_bits(4)
    exporter = CannExporter(float_bias=True)
    artifact = export(model, exporter, tmp_path / "net")
    assert exporter.differences(model, artifact) == ()
    file = onnx.load(artifact.files["model"])
    name = model.layers[0].name
    bias = next(i for i in file.graph.initializer if i.name == f"{name}.bias")
    bias.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(bias), bias.name))
    onnx.save(file, artifact.files["model"])
    (difference,) = exporter.differences(model, artifact)
    assert difference.startswith(f"{name}: float bias must be ")


def test_device_nodes_have_no_float_biases() -> None:
    with pytest.raises(ValueError, match="float_bias=True needs rnn='unrolled'"):
        CannExporter(float_bias=True, rnn="device")


def test_a_weight_of_minus_128_beside_small_ones_has_no_room() -> None:
    # As the recipe amct trains it; the absolute value of -128 does not fit int8.
    linear, x = nn.Linear(4, 2), torch.randn(8, 4)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-128.0, 3, 2, 1], [1, 2, 3, -128]]))
    model = convert(trained(linear, x, "amct"), x)
    (layer,) = model.layers
    integers = model.tensors[layer.weight_key].integers
    assert integers is not None
    assert int(integers.min()) == -128
    assert int(integers.max()) < 32
    assert torch.equal(with_finer_biases(model)(x), model(x))
