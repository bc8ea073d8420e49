"""Layers whose numbers happen to be equal are still two, and read one pair where they may."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import QuantizedModel, Recipe, convert, export, verify
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import trained

TARGETS = [
    "fake_quant_onnx",
    "cann",
    pytest.param("tflite", marks=pytest.mark.xdist_group("tflite")),
]
LAYERS_ONLY = Recipe(joins=False, outputs=False)


class Branches(nn.Module):
    """Two layers read one tensor, each through a quantizer of its own that sees the same range."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3)
        self.right = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x).relu() + self.right(x)


class Copies(nn.Module):
    """Layers that began as copies and have not been trained apart, as nn.TransformerEncoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = copy.deepcopy(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def agreed(model: QuantizedModel, target: Any, folder: Path) -> dict[str, Path]:
    if target == "tflite":
        pytest.importorskip("litert_torch")
    artifact = export(model, target, folder / "net")
    agreement = verify(model, artifact)
    assert agreement.parameter_differences == ()
    assert agreement.max_steps <= 1.01
    return dict(artifact.files)


def nodes(file: Path, kind: str) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(file).graph.node if node.op_type == kind]


@pytest.mark.parametrize("recipe", [LAYERS_ONLY, "amct"], ids=["joins=False", "amct"])
@pytest.mark.parametrize("target", TARGETS)
def test_two_readers_of_one_tensor(target: str, recipe: Any, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 6, 6)
    model = convert(trained(Branches(), x, recipe), x)
    left, right = (model.tensors[f"{name}.input"].qparams for name in ("left", "right"))
    assert torch.equal(left.scale, right.scale)
    assert torch.equal(left.zero_point, right.zero_point)
    files = agreed(model, target, tmp_path)
    # What AMCT writes, too.
    if target != "tflite":
        kind = "QuantizeLinear" if target == "fake_quant_onnx" else "AscendQuant"
        assert len(nodes(files["model"], kind)) == 1


@pytest.mark.parametrize("target", TARGETS)
def test_layers_with_equal_weights(target: str, tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    model = convert(trained(Copies(), x, "int8"), x)
    first, second = (model.tensors[f"{name}.weight"].integers for name in ("first", "second"))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    agreed(model, target, tmp_path)


def test_a_grid_is_not_shared_with_another_of_the_same_scale(tmp_path: Path) -> None:
    # 7 / 7 and 127 / 127: one step is 1.0 on both, and 4 bits end at 7.
    narrow, wide = (
        {"activation": {"bits": bits, "symmetric": True, "clip": (-end, end)}}
        for bits, end in ((4, 7.0), (8, 127.0))
    )
    recipe = Recipe(joins=False, outputs=False, overrides={"left": narrow, "right": wide})
    x = 20 * torch.randn(4, 3, 6, 6)
    model = convert(trained(Branches(), x, recipe), x)
    scales = [model.tensors[f"{name}.input"].qparams.scale for name in ("left", "right")]
    assert scales == [1.0, 1.0]
    files = agreed(model, FakeQuantOnnxExporter(), tmp_path)
    assert len(nodes(files["model"], "QuantizeLinear")) == 2
