"""Weights, biases, statistics and constants that are not finite are refused by the layer's name."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import convert, prepare

BATCH = 4, 3, 8, 8


class Network(nn.Module):
    """Layers with a batch norm between them, a float layer, a constant, a mask, an unused layer."""

    mask: Tensor
    gain: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("gain", torch.ones(3))
        self.register_buffer("mask", torch.tensor([0.0, -math.inf, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        """Pool between the layers, and mask at the end."""
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return torch.softmax(self.norm(self.fc(x)) * self.gain + self.mask, -1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    prepare(model, {"outputs": False, "joins": False}, torch.randn(BATCH))
    for _ in range(3):
        model(torch.randn(BATCH))
    return model


def broken(trained: nn.Module, **values: float) -> nn.Module:
    model = copy.deepcopy(trained)
    for name, value in values.items():
        layer, _, own = name.rpartition("__")
        with torch.no_grad():
            getattr(model.get_submodule(layer), own).view(-1)[0] = value
    return model


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("layer", "own"),
    [
        ("conv", "weight"),
        ("conv", "bias"),
        ("fc", "bias"),
        ("norm", "weight"),
        ("norm", "bias"),
        ("bn", "bias"),
        ("bn", "running_var"),
    ],
)
def test_a_model_that_is_not_finite_is_refused_by_name(
    layer: str, own: str, bad: float, trained: nn.Module
) -> None:
    model = broken(trained, **{f"{layer}__{own}": bad})
    with pytest.raises(
        ValueError, match=rf"(?:finite\.|;) {layer}: its {own} is not finite\. .*lower"
    ):
        convert(model, torch.randn(BATCH))


def test_all_of_them_are_named_at_once(trained: nn.Module) -> None:
    model = broken(trained, conv__weight=math.nan, fc__bias=math.inf, bn__running_mean=math.nan)
    with pytest.raises(
        ValueError, match=r"conv: its weight is.*fc: its bias is.*bn: its running_mean is"
    ):
        convert(model, torch.randn(BATCH))
    model = broken(trained, norm__bias=math.nan, fc__bias=math.inf)
    with pytest.raises(ValueError, match=r"(?s)(?=.*fc: its bias is)(?=.*norm: its bias is)"):
        convert(model, torch.randn(BATCH))


def test_a_mask_may_be_infinite_and_what_is_not_used_may_be_anything(trained: nn.Module) -> None:
    model, x = broken(trained, unused__bias=math.nan), torch.randn(BATCH)
    assert bool(convert(model, x)(x).isfinite().all())


def test_a_constant_that_is_not_a_number_is_refused(trained: nn.Module) -> None:
    with pytest.raises(ValueError, match="the model: its gain is not finite"):
        convert(broken(trained, __gain=math.nan), torch.randn(BATCH))


def test_no_exporter_is_given_a_converted_model_that_is_not_finite(trained: nn.Module) -> None:
    quantized = convert(trained, torch.randn(BATCH))
    values = {name: value.clone() for name, value in quantized.program.state_dict.items()}
    (bias,) = {name for name in values if "conv" in name and "bias" in name}
    try:
        quantized.program.state_dict[bias].view(-1)[0] = math.inf
        with pytest.raises(
            ValueError, match=r"constant of a converted model must be finite: .*conv"
        ):
            replace(quantized)
        quantized.program.state_dict[bias].copy_(values[bias])
        (scale,) = {name for name in values if "fc.weight" in name and "scale" in name}
        quantized.program.state_dict[scale].view(-1)[0] = 0.0
        with pytest.raises(ValueError, match=r"'fc\.weight': scale must be positive and finite"):
            replace(quantized)
    finally:
        for name, value in values.items():
            quantized.program.state_dict[name].copy_(value)
