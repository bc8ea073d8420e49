"""EmbeddingQAT against nn.Embedding, and what its table becomes in files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from lightning_qat import Recipe, convert, export, prepare, verify
from lightning_qat.layers import EmbeddingQAT
from lightning_qat.numerics import rounding as fake_quantization
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.training.weights_once import weights_quantized_once

LOOKED_UP = torch.tensor([[1, 2, 2], [0, 9, 2]])


class Tokens(nn.Module):
    """A table and a head; takes indices (batch, time)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


class Tied(Tokens):
    """The head's weight is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight


def trained(model: nn.Module, recipe: Any) -> nn.Module:
    prepare(model, recipe, LOOKED_UP)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(LOOKED_UP).square().mean().backward()
        optimizer.step()
    return model


def test_a_row_has_its_own_scale() -> None:
    # 2.54 / 127 = 0.02 and 1.27 / 127 = 0.01.
    table = nn.Embedding.from_pretrained(torch.tensor([[2.54, 0.013], [-1.27, 0.013]]))
    rows = EmbeddingQAT.from_float(table)(torch.tensor([0, 1]))
    torch.testing.assert_close(rows, torch.tensor([[2.54, 0.02], [-1.27, 0.01]]))


def test_a_table_may_have_one_scale() -> None:
    table = nn.Embedding.from_pretrained(torch.tensor([[2.54, 0.013], [-1.27, 0.013]]))
    config = {"weight": {"granularity": "per_tensor"}}
    rows = EmbeddingQAT.from_float(table, config)(torch.tensor([0, 1]))
    torch.testing.assert_close(rows, torch.tensor([[2.54, 0.02], [-1.28, 0.02]]))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_are_those_of_the_float_layer(options: dict[str, Any]) -> None:
    layer = nn.Embedding(10, 4, **options)
    qat = EmbeddingQAT.from_float(copy.deepcopy(layer))
    factors = torch.randn(2, 3, 4)
    for one in (layer, qat):
        (one(LOOKED_UP) * factors).sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(qat.weight.grad, layer.weight.grad, rtol=0, atol=0)
    assert not layer.weight.grad[3].any()


@pytest.mark.parametrize("quantizer", ["minmax", "arq", "learned"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_few_rows_come_out_as_from_the_whole_table(options: dict[str, Any], quantizer: str) -> None:
    few = EmbeddingQAT(10, 4, **options, config={"weight": {"quantizer": quantizer, "bits": 3}})
    few(torch.arange(10))  # learned scales start here
    whole = copy.deepcopy(few)
    factors = torch.randn(2, 3, 4)
    rows = few(LOOKED_UP)
    with weights_quantized_once(whole):
        expected = whole(LOOKED_UP)
    for found in (rows, expected):
        (found * factors).sum().backward()
    assert torch.equal(rows, expected)
    assert few.weight.grad is not None
    assert torch.equal(few.weight.grad, whole.weight.grad)


@pytest.mark.parametrize(
    ("read", "rounded"), [([[3, 3, 7]], 3), ([list(range(10))], 10), ([[]], 10), (5, 1)], ids=str
)
def test_only_rows_that_are_read_are_rounded(
    read: Any, rounded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, by_steps = [], fake_quantization._by_steps
    monkeypatch.setattr(
        fake_quantization,
        "_by_steps",
        lambda x, *args: (sizes.append(len(x)), by_steps(x, *args))[1],
    )
    monkeypatch.setattr(kernels, "compiled_loops", lambda: None)
    indices = torch.tensor(read, dtype=torch.int64)
    assert EmbeddingQAT(10, 4)(indices).shape == (*indices.shape, 4)
    assert sizes == [rounded]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_norm": 1.0}, "max_norm rescales the float table within forward; it must be None"),
        (
            {"sparse": True},
            "sparse gradients become dense when the table is rounded; sparse must be False",
        ),
    ],
)
def test_what_would_change_the_table_or_its_gradient_is_refused(
    options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"EmbeddingQAT cannot be made: {reason}"):
        EmbeddingQAT(10, 4, **options)
    model = Tokens(**options)
    report = prepare(model, "int8", LOOKED_UP)
    assert [(s.name, s.reason) for s in report.skipped] == [("table", reason)]
    assert type(model.table) is nn.Embedding


def test_a_table_that_is_the_head_s_weight_has_the_head_s_quantizer() -> None:
    model: Any = nn.Sequential(Tied(), nn.Linear(10, 2))
    report = prepare(model, "int8", LOOKED_UP)
    assert [s.name for s in report.swapped] == ["0.table", "0.head", "1"]
    assert model[0].table.weight_quantizer is model[0].head.weight_quantizer


def test_checkpoints_load_both_ways() -> None:
    layer = nn.Embedding(10, 4, padding_idx=1)
    qat = EmbeddingQAT(10, 4, padding_idx=1)
    qat.load_state_dict(layer.state_dict())
    back = qat.to_float()
    assert type(back) is nn.Embedding
    assert back.padding_idx == 1
    assert torch.equal(back(LOOKED_UP), layer(LOOKED_UP))
    assert back.state_dict().keys() == layer.state_dict().keys()


def test_a_qat_checkpoint_rebuilds_it() -> None:
    model, twin = trained(Tokens(), "w4a8"), Tokens()
    prepare_like(twin, model.state_dict())
    twin.load_state_dict(model.state_dict())
    assert type(twin.table) is EmbeddingQAT
    assert torch.equal(twin.eval()(LOOKED_UP), model.eval()(LOOKED_UP))


def test_the_report_says_that_only_the_weight_is_quantized() -> None:
    report = prepare(Tokens(), "int8", LOOKED_UP)
    assert "  table  Embedding: weight 8 bits per_channel minmax\n" in str(report)


def test_amct_leaves_embeddings_float() -> None:
    assert [s.name for s in prepare(Tokens(), "amct").swapped] == ["head"]


def test_compiled_it_computes_the_same() -> None:
    torch._dynamo.reset()
    model = trained(Tokens(), "int8").eval()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(LOOKED_UP), model(LOOKED_UP))


@pytest.mark.parametrize(
    "recipe",
    ["int8", "w4a8", {"preset": "int8", "weight": {"granularity": "per_tensor"}}],
    ids=str,
)
@pytest.mark.parametrize(
    "target",
    ["fake_quant_onnx", "cann", pytest.param("tflite", marks=pytest.mark.xdist_group("tflite"))],
)
def test_files_agree_with_torch(target: str, recipe: Any, tmp_path: Path) -> None:
    if target == "tflite":
        pytest.importorskip("litert_torch")
    quantized = convert(trained(Tokens(padding_idx=0), recipe), LOOKED_UP)
    assert next(iter(quantized.tensors)) == "table.weight"
    artifact = export(quantized, target, tmp_path / "net")
    agreement = verify(quantized, artifact)
    assert agreement.parameter_differences == ()
    assert agreement.max_steps <= 1.01
    if target == "cann":
        assert artifact.notes == ("'table': Gather keeps real weights.",)


def test_onnx_reads_rows_of_an_integer_table(tmp_path: Path) -> None:
    quantized = convert(trained(Tokens(), "int8"), LOOKED_UP)
    proto = onnx.load(export(quantized, "fake_quant_onnx", tmp_path / "net").files["model"])
    made_by = {node.output[0]: node for node in proto.graph.node}
    stored = {i.name: numpy_helper.to_array(i) for i in proto.graph.initializer}
    (gather,) = (node for node in proto.graph.node if node.op_type == "Gather")
    dequantize = made_by[gather.input[0]]
    assert dequantize.op_type == "DequantizeLinear"
    table = stored[dequantize.input[0]]
    assert (table.dtype, table.shape) == ("int8", (10, 4))
    assert stored[dequantize.input[1]].shape == (10,)


@pytest.mark.xdist_group("tflite")
def test_tflite_stores_an_integer_table_and_its_numbers_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    from lightning_qat_exporters import TFLiteExporter
    from lightning_qat_exporters.tflite.flatbuffer.file import read

    quantized = convert(trained(Tokens(), Recipe()), LOOKED_UP)
    artifact = export(quantized, "tflite", tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    (table,) = (t for t in file.tensors if t.shape == (10, 4) and t.data is not None)
    assert (table.type, table.scale.size, table.axis) == ("INT8", 10, 0)
    quantized.tensors["table.weight"].integers[0, 0] += 1  # type: ignore[index]
    assert TFLiteExporter().differences(quantized, artifact) == (
        "table.weight: no operator of the file has its integers and scales",
    )
