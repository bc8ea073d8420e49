"""Inputs with one batch dimension, and other dynamic sizes, in a file of fixed sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lightning_qat import export, verify
from lightning_qat.convert.convert import convert
from lightning_qat.export.other_batch import OtherBatch
from lightning_qat_exporters.tflite.decompose.sample import later_batch_axes, sample_of
from lightning_qat_exporters.tflite.exporter import TFLiteExporter
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


class TimeFirst(nn.Module):
    """Returns (time, batch, classes), as a loss of CTC takes it, and (batch, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # A row for every sample, as models write that add the identity.
        shift = torch.eye(3).flatten()[None].repeat(x.shape[0], 1).view(-1, 3, 3)
        y = self.fc(x)
        return y.permute(1, 0, 2), y[:, :3] + shift


def test_samples_are_put_together_where_an_output_has_its_batch(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    x = torch.randn(3, 5, 4)
    model = convert(trained(TimeFirst(), x), x)
    assert later_batch_axes(model) == {model.output_names[0]: 1}
    artifact = export(model, TFLiteExporter(backend="litert"), tmp_path / "net")
    (runtime, *_) = verify(model, artifact).runtimes
    assert runtime.max_steps <= 1.0


class Heads(nn.Module):
    """Splits channels into heads, turns them, writes in place and joins them again."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        batch, time = x.shape[:2]
        heads = self.fc(x).view(batch, time, 2, 4).transpose(1, 2)
        turned = heads.softmax(-1)
        turned[..., 0] += 1.0
        return turned.transpose(1, 2).contiguous().view(batch, time, 8)


def test_a_view_of_what_was_turned_is_a_reshape(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    x = torch.randn(2, 3, 8)
    model = convert(trained(Heads(), x), x)
    artifact = export(model, TFLiteExporter(backend="litert"), tmp_path / "net")
    (runtime, *_) = verify(model, artifact).runtimes
    assert runtime.max_steps <= 1.0


class Squeezes(nn.Module):
    """``squeeze()`` names no axes: of one sample it would take the batch away too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.conv(x).amax((2, 3), keepdim=True).squeeze())
        return result


def test_squeeze_without_axes_keeps_the_batch_of_one_sample(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    x = torch.randn(4, 4, 8, 8)
    model = convert(trained(Squeezes(), x), x)
    exporter = TFLiteExporter(backend="litert")
    # Output shapes are compared too.
    agreement = verify(model, export(model, exporter, tmp_path / "net"), x, exporter)
    assert agreement.max_steps <= 1.001
