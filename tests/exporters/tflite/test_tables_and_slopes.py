"""Tables whose rows are constants, slopes of PReLU, operators without a lowering, and notes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat.export.verify import verify
from lightning_qat.recipe.recipe import Recipe
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import read
from tests.models import trained

pytest.importorskip("litert_torch")
pytestmark = pytest.mark.xdist_group("tflite")


class Embeddings(nn.Module):
    """BERT's: words, positions, and token types of a buffer that has the batch's size."""

    token_type_ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(20, 8), nn.Embedding(16, 8)
        self.types, self.fc = nn.Embedding(2, 8), nn.Linear(8, 3)
        self.register_buffer("token_type_ids", torch.zeros(1, 16, dtype=torch.long))

    def forward(self, input_ids: Tensor) -> Tensor:
        batch, time = input_ids.shape
        positions = torch.arange(time).unsqueeze(0)
        types = self.token_type_ids[:, :time].expand(batch, time)
        x = self.words(input_ids) + self.positions(positions) + self.types(types)
        y: Tensor = self.fc(x)
        return y


def test_tables_whose_rows_are_constants_are_no_operators_of_the_file(tmp_path: Path) -> None:
    x = torch.randint(0, 20, (4, 6))
    model = convert(trained(Embeddings(), x), x)
    exporter = TFLiteExporter(backend="litert")
    agreement = verify(model, export(model, exporter, tmp_path / "net"), x, exporter)
    assert agreement.parameter_differences == ()
    assert agreement.max_steps <= 1


def test_a_prelu_with_one_slope_is_an_integer_leaky_relu(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(4, 3, 6, 6)
    model = convert(trained(net, x), x)
    exporter = TFLiteExporter(backend="litert")
    artifact = export(model, exporter, tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    kinds = {op.kind: file.tensors[op.outputs[0]].type for op in file.operators}
    assert kinds["LEAKY_RELU"] == "INT8"
    assert not file.float_operators
    assert artifact.differences == ()
    assert verify(model, artifact, x, exporter).max_steps <= 2


class Bag(nn.Module):
    """A bag of words and a head; takes (batch, 5) indices."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.EmbeddingBag(10, 4, mode="sum"), nn.Linear(4, 2)

    def forward(self, indices: Tensor) -> Tensor:
        y: Tensor = self.fc(self.words(indices))
        return y


def test_an_operator_without_a_lowering_is_named_with_its_module(tmp_path: Path) -> None:
    x = torch.randint(0, 10, (3, 5))
    model = convert(trained(Bag(), x), x)
    with pytest.raises(
        UnsupportedByTarget, match=r"words, embedding_bag: litert-torch could not convert it"
    ):
        export(model, TFLiteExporter(backend="litert"), tmp_path / "net")


def test_no_note_advises_joins_that_the_recipe_has(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Softplus())
    x = torch.randn(8, 4)
    advised = {}
    for wanted in (True, False):
        recipe = Recipe(joins=wanted, outputs=wanted)
        model = convert(trained(copy.deepcopy(net), x, recipe), x)
        artifact = export(model, TFLiteExporter(backend="litert"), tmp_path / f"net{wanted}")
        advised[wanted] = "joins=True" in " ".join(artifact.notes)
    assert advised == {True: False, False: True}
