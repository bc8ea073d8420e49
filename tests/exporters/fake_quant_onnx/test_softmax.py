"""A quantized softmax computes the same in ONNX Runtime's default session as in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import ActivationSpec, Recipe, convert, prepare
from lightning_qat_exporters import FakeQuantOnnxExporter

pytestmark = pytest.mark.xdist_group("onnx")


class Gate(nn.Module):
    """A softmax over the last of ``(batch, 1, values)``, behind a layer that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Conv1d(1, 1, 1, bias=False)
        nn.init.ones_(self.scores.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.scores(x), -1)


def exported(recipe: Recipe, x: Tensor, folder: Path, *, dynamic: bool = False) -> Path:
    net = Gate()
    prepare(net, recipe, x)
    with torch.no_grad():
        net.train()(x)
    shapes = {"x": {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO}} if dynamic else None
    model = convert(net.eval(), x, dynamic_shapes=shapes)
    return FakeQuantOnnxExporter().export(model, folder / "net").files["model"]


def in_default_session(path: Path, x: Tensor) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(result)


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def far_from_torch(result: np.ndarray, x: Tensor) -> float:
    return float(np.abs(result - torch.softmax(x, -1).numpy()).max())


LEARNED = Recipe(activation=ActivationSpec(quantizer="learned", calibration="minmax"))


def test_answers_on_a_narrow_learned_range_are_those_of_torch(tmp_path: Path) -> None:
    """8 answers of about 1/8: steps of 1/2000, 1/(148 * 8) is the smallest that ORT can take."""
    x = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(0)) / 100
    path = exported(LEARNED, x, tmp_path)
    assert "Abs" in kinds(path)
    assert far_from_torch(in_default_session(path, x), x) < 1 / 1000


def test_one_value_of_a_dimension_that_is_not_fixed_has_the_answer_one(tmp_path: Path) -> None:
    """Attention to the first token; 255/256 is the nearest that is on the grid."""
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    path = exported(Recipe(), x, tmp_path, dynamic=True)
    np.testing.assert_array_equal(
        in_default_session(path, x[..., :1]), np.full((4, 1, 1), 255 / 256)
    )
    assert far_from_torch(in_default_session(path, x), x) < 1 / 100


def test_a_softmax_that_the_integer_kernel_computes_right_stays_as_it_is(tmp_path: Path) -> None:
    x = torch.randn(4, 1, 6, generator=torch.Generator().manual_seed(0))
    path = exported(Recipe(), x, tmp_path)
    assert "Abs" not in kinds(path)
    assert far_from_torch(in_default_session(path, x), x) < 1 / 100
