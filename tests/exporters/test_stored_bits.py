"""What is said before training of bits that a file cannot store."""

import pytest
import torch
from torch import nn

from lightning_qat import ActivationSpec, Recipe, WeightSpec, convert
from lightning_qat.export.protocol import Cautioning
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter, TFLiteExporter
from tests.models import NETWORKS, inputs_for, trained


def said(exporter: Cautioning, weight: int, activation: int) -> str:
    x = inputs_for("linear")
    recipe = Recipe(
        weight=WeightSpec(bits=weight), activation=ActivationSpec(bits=activation), outputs=False
    )
    model = convert(trained(NETWORKS["linear"][0](), x, recipe), x)
    return " ".join(text for text in exporter.cautions(model) if "take 8 bits" in text)


TAKES = "take 8 bits in the file, which is no smaller and no faster than with 8."


@pytest.mark.parametrize(
    ("weight", "activation", "what"),
    [
        (4, 8, "weights of 4 bits"),
        (2, 8, "weights of 2 bits"),
        (8, 4, "activations of 4 bits"),
        (3, 4, "weights of 3 bits and activations of 4 bits"),
    ],
)
@pytest.mark.parametrize("exporter", [TFLiteExporter(), CannExporter(), FakeQuantOnnxExporter()])
def test_few_bits_that_take_8_are_said(
    exporter: Cautioning, weight: int, activation: int, what: str
) -> None:
    assert said(exporter, weight, activation).startswith(f"{what} {TAKES}")


# 7 bits are trained because their products do not saturate.
@pytest.mark.parametrize(("weight", "activation"), [(8, 8), (7, 8), (5, 6)])
@pytest.mark.parametrize("exporter", [TFLiteExporter(), CannExporter(), FakeQuantOnnxExporter()])
def test_of_more_bits_nothing_is_said(exporter: Cautioning, weight: int, activation: int) -> None:
    assert not said(exporter, weight, activation)


@pytest.mark.parametrize(
    ("exporter", "packs"),
    [
        (CannExporter(), CannExporter(int4_weights=True)),
        (FakeQuantOnnxExporter(), FakeQuantOnnxExporter(int4_weights=True, opset=21)),
    ],
)
def test_what_packs_weights_of_4_bits_is_named_and_then_nothing_is_said(
    exporter: Cautioning, packs: Cautioning
) -> None:
    assert "int4_weights=True" in said(exporter, 4, 8)
    assert "int4_weights" not in said(exporter, 2, 8)
    assert said(packs, 4, 8) == ""
    assert said(packs, 2, 4).startswith("weights of 2 bits and activations of 4 bits")


def test_different_bits_are_all_named() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4)
    recipe = Recipe.from_dict(
        {"overrides": {"0": {"weight": {"bits": 4}}, "1": {"weight": {"bits": 2}}}}
    )
    model = convert(trained(net, x, recipe), x)
    (text,) = TFLiteExporter().cautions(model)
    assert text == f"weights of 2 and 4 bits {TAKES}"
