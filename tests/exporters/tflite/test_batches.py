"""Inputs with one batch dimension, and other dynamic sizes, in a file of fixed sizes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim

from lightning_qat.convert.convert import convert
from lightning_qat.export.other_batch import OtherBatch
from lightning_qat_exporters.tflite.decompose.sample import sample_of
from lightning_qat_exporters.tflite.unsupported import problems_of
from tests.models import trained


class Masked(nn.Module):
    """Reads its mask by indices, as transformers' models do; takes (batch, 6, 4), (batch, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0])[:, None]
        kept = attention_mask.bool()[rows, torch.arange(6)]
        scores: Tensor = self.fc(x).masked_fill(~kept[..., None], 0.0)
        return scores


def example() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.long)


def test_inputs_of_one_batch_size_are_given_one_sample_each() -> None:
    model = convert(trained(Masked(), example()), example())
    nodes = [n for n in model.program.graph.nodes if n.name in model.input_names]
    assert len({str(n.meta["val"].shape[0]) for n in nodes}) == 2, "torch.export has two names"
    assert {name: shape[0] for name, shape in model.input_shapes.items()} == {
        "x": "batch",
        "attention_mask": "batch",
    }
    other = OtherBatch.of(model, *model.example_inputs)
    assert other is not None
    assert {name: len(x) for name, x in other.inputs.items()} == {"x": 1, "attention_mask": 1}
    assert problems_of(model, linear_per_tensor=False) == ()
    assert {name: len(x) for name, x in sample_of(model).items()} == {"x": 1, "attention_mask": 1}


def test_another_dynamic_size_is_refused_and_the_remedies_work() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 6, 4)
    qat = trained(net, x)
    model = convert(qat, x, dynamic_shapes={"input": {0: Dim.AUTO, 1: Dim.AUTO}})
    (problem,) = problems_of(model, linear_per_tensor=False)
    assert "axis 1 of this input is too" in problem.reason
    assert "QATCallback(dynamic_shapes={}), or convert(..., dynamic_batch=False)" in problem.remedy
    for fixed in (convert(qat, x, dynamic_batch=False), convert(qat, x, dynamic_shapes={})):
        assert fixed.input_shapes == {"input": (2, 6, 4)}
        assert problems_of(fixed, linear_per_tensor=False) == ()
