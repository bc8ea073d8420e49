"""Batch norm is folded exactly; dropout goes; nothing else changes."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from tests.convert.cases import one_step, operators
from tests.models import INPUTS_ONLY, conv_bn_relu, inputs_for, trained


def test_a_folded_model_differs_by_rounding_only_where_nothing_is_quantized_behind_it() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), torch.randn(8, 2, 6, 6)
    trained(model, x)
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    with torch.no_grad():
        # 18 products in float32, scaled before or after the sum; the largest output is below 8.
        torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=8 * 2.0**-23 * 6)


# Structures


class CalledTwice(nn.Module):
    """One convolution, called with a batch norm behind it and without; either order."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm_first = norm_first
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_first:
            return self.conv(self.bn(self.conv(x)))
        return self.bn(self.conv(self.conv(x)))


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_layer_called_twice_is_folded_for_one_call_only(norm_first: bool) -> None:
    model, x = CalledTwice(norm_first), torch.randn(4, 2, 3, 3)
    trained(model, x, INPUTS_ONLY)
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    assert set(quantized.tensors) == {"conv.input", "conv.weight", "conv.weight_1"}
    plain, folded = (quantized.tensors[f"conv.weight{suffix}"] for suffix in ("", "_1"))
    # gamma of channel 0 is negative: the folded integers are mirrored.
    assert plain.integers is not None
    assert folded.integers is not None
    mirror = torch.tensor([-1, 1]).reshape(2, 1, 1, 1)
    pair = (plain.integers, folded.integers)
    assert torch.equal(pair[0] * mirror, pair[1].long()) or torch.equal(pair[1] * mirror, pair[0])
    # Rounding of the fold, or one step of the second call's input.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=one_step(model))


def test_a_convolution_that_is_also_used_elsewhere_is_not_folded() -> None:
    class Also(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)
            self.bn = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    model, x = Also(), torch.randn(4, 2, 3, 3)
    trained(model, x)
    quantized = convert(model, x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


def test_a_convolution_that_stays_float_is_folded_too() -> None:
    x = inputs_for("conv_bn_relu")
    model = trained(conv_bn_relu(), x, replace(INPUTS_ONLY, exclude=("0",)))
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    assert set(quantized.tensors) == {"3.input", "3.weight"}
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=one_step(model))


@pytest.mark.parametrize("padding", ["same", "valid", 1, 0])
def test_every_spelling_of_padding_is_folded(padding: Any) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=padding), nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 2, 5, 5)
    quantized = convert(trained(model, x), x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_linear_layer_s_batch_norm_is_folded_in_2_d() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.randn(6, 4)
    quantized = convert(trained(model, x), x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_linear_layer_s_batch_norm_over_time_is_not_folded() -> None:
    # It normalises axis 1, which is time here.
    model, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(5)), torch.randn(6, 5, 4)
    quantized = convert(trained(model, x), x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


def test_a_batch_norm_of_the_batch_s_own_statistics_is_not_folded() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.randn(4, 2, 3, 3)
    prepare(model)
    model(x)
    model.eval()
    quantized = convert(model, x)
    assert operators(quantized).count("batch_norm") == 1
    assert torch.equal(quantized(x), model(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fold_needs_neither_gamma_nor_bias(affine: bool, bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=bias), nn.BatchNorm2d(3, affine=affine))
    x = torch.randn(4, 2, 3, 3)
    prepare(model)
    model(x)
    model.eval()
    quantized = convert(model, x)
    assert "batch_norm" not in operators(quantized)
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dropout", [nn.Dropout, nn.Dropout2d])
def test_a_dropout_in_between_is_in_nobody_s_way(dropout: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1), dropout(), nn.BatchNorm2d(3))
    x = torch.randn(4, 2, 3, 3)
    quantized = convert(trained(model, x), x)
    assert operators(quantized).count("batch_norm") == 0
    # Rounding of the fold only.
    torch.testing.assert_close(quantized(x), model(x), rtol=0, atol=1e-5)


def test_a_dropout_that_the_forward_keeps_on_in_eval_mode_stays() -> None:
    class MonteCarlo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 64)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.fc(x), 0.5, training=True)

    model, x = MonteCarlo(), torch.randn(2, 4)
    quantized = convert(trained(model, x), x)
    assert bool((model(x) == 0).any())
    assert bool((quantized(x) == 0).any())


@pytest.mark.parametrize("last", [nn.BatchNorm2d(3), nn.Dropout(), nn.Identity()], ids=str)
def test_a_graph_that_ends_in_what_is_removed_stays_consistent(
    last: nn.Module, tmp_path: Path
) -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 3, 1), last), torch.randn(4, 2, 3, 3)
    quantized = convert(trained(model, x), x)
    output = quantized.program.graph.output_node().args[0][0]  # type: ignore[index, union-attr]
    assert quantized.program.graph_signature.user_outputs == (output.name,)
    quantized.program.validate()
    quantized.save(tmp_path / "model.pt2")
    assert torch.equal(QuantizedModel.load(tmp_path / "model.pt2")(x), quantized(x))


def test_amct_s_grid_saturates_with_a_warning_that_names_the_weight() -> None:
    model, x = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)), torch.ones(2, 2, 3, 3)
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([-1.0, 0.5]).reshape(1, 2, 1, 1)
    trained(model, x, "amct")
    with pytest.warns(UserWarning, match=r"0\.weight: 1 integers of the folded weight saturate"):
        quantized = convert(model, x)
    integers = quantized.tensors["0.weight"].integers
    assert integers is not None
    assert integers.flatten().tolist() == [127, -64, -128, 64]


class Scaled(nn.Module):
    """A layer and what its result is multiplied with."""

    def __init__(self, layer: nn.Module, function: Any) -> None:
        super().__init__()
        self.layer, self.function = layer, function
        self.register_buffer("gain", torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function(self.layer(x), self.gain)
        return result


FACTORS: dict[str, tuple[Any, float]] = {
    "a number": (lambda y, gain: y * 0.1, 0.1),
    "a negative number": (lambda y, gain: -2.0 * y, -2.0),
    "a divisor": (lambda y, gain: y / 4.0, 0.25),
    "a buffer of one number, in place": (lambda y, gain: y.mul_(gain), 0.3),
}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3), nn.Linear(6, 5), nn.Conv2d(3, 4, 1, bias=False)]
)
@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_is_folded_into_scales_and_bias(name: str, layer: nn.Module) -> None:
    function, factor = FACTORS[name]
    x = torch.randn(4, 3, 6, 6)
    qat = trained(Scaled(copy.deepcopy(layer), function), x, INPUTS_ONLY)
    plain = copy.deepcopy(qat)
    plain.function = lambda y, gain: y
    model, without = convert(qat, x), convert(plain, x)
    (folded,), (unfolded,) = model.layers, without.layers
    assert not [n for n in model.program.graph.nodes if "mul" in n.name or "div" in n.name]
    weight, expected = (m.tensors["layer.weight"] for m in (model, without))
    torch.testing.assert_close(weight.qparams.scale, expected.qparams.scale * abs(factor))
    assert weight.integers is not None
    assert expected.integers is not None
    assert torch.equal(weight.integers, expected.integers * (1 if factor > 0 else -1))
    if unfolded.bias is not None:
        torch.testing.assert_close(folded.bias, unfolded.bias * factor)
    torch.testing.assert_close(model(x), qat(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda y, gain: y * 0.0,
        lambda y, gain: y * y.mean(),
        lambda y, gain: y * gain.view(1, 1, 1, 1, 1),
        lambda y, gain: 4.0 / y,
        lambda y, gain: y * 0.1 + y,
    ],
)
def test_other_products_are_not_folded(function: Any) -> None:
    x = torch.randn(4, 3, 6, 6)
    qat = trained(Scaled(nn.Conv2d(3, 4, 3), function), x, INPUTS_ONLY)
    model = convert(qat, x)
    names = [n.name.partition("_")[0] for n in model.program.graph.nodes]
    assert {"mul", "div", "reciprocal"} & set(names)
    torch.testing.assert_close(model(x), qat(x), rtol=1e-4, atol=1e-5)


def test_one_scale_for_all_channels_stays_one() -> None:
    recipe = {"weight": {"granularity": "per_tensor"}, "joins": False, "outputs": False}
    x = torch.randn(4, 3, 6, 6)
    net = Scaled(nn.Conv2d(3, 4, 3), lambda y, gain: y * 0.1)
    model = convert(trained(net, x, recipe), x)  # type: ignore[arg-type]
    assert model.tensors["layer.weight"].qparams.axis is None
