"""A model's outputs are quantized, whatever container holds them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import QuantizedModel, Recipe
from lightning_qat.convert.convert import convert
from lightning_qat.prepare.prepare import prepare
from tests.joins.cases import Registered, calibrated, serving, the_plan


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Boxes(NamedTuple):
    scores: Tensor
    labels: list[Tensor]


@dataclass
class Record:
    logits: Tensor
    count: int = 1


class Returns(nn.Module):
    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.two, self.shape = nn.Linear(4, 4), nn.Linear(4, 2), shape

    def forward(self, x: Tensor) -> Any:
        y = self.one(x)
        return self.shape(F.relu(y), self.two(y))


SHAPES: dict[
    str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]
] = {
    "tuple": (lambda a, b: (a, b), lambda o: (o[0], o[1])),
    "list": (lambda a, b: [a, b], lambda o: (o[0], o[1])),
    "dict": (lambda a, b: {"a": a, "b": b, "n": 3}, lambda o: (o["a"], o["b"])),
    "NamedTuple": (Pair, lambda o: (o.first, o.second)),
    "nested": (lambda a, b: {"x": (a, [None, (b,)])}, lambda o: (o["x"][0], o["x"][1][1][0])),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("planned_by", ["example inputs", "first batch"])
def test_nested_outputs_are_quantized_and_keep_their_form(kind: str, planned_by: str) -> None:
    make, read = SHAPES[kind]
    model, x = Returns(make), torch.randn(64, 4)
    prepare(model, "int8", x if planned_by == "example inputs" else None)
    model.train()
    model(x)
    model.eval()
    output = model(x)
    assert type(output) is type(make(x, x))
    first, second = read(output)
    quantized = convert(model, x)
    assert len(quantized.output_steps) == 2
    assert type(quantized(x)) is type(output)
    for tensor, step in zip((first, second), quantized.output_steps.values(), strict=True):
        on_grid = tensor.detach().double() / step
        assert torch.allclose(on_grid, on_grid.round(), atol=1e-3)
        assert tensor.unique().numel() > 8


def test_a_dataclass_that_torch_does_not_know_is_looked_into() -> None:
    model, x = Returns(lambda a, b: Record(b)), torch.randn(64, 4)
    report = prepare(model, "int8", x)
    assert report.joins is not None
    assert report.joins.left_float == ()
    model(x)
    output = model.eval()(x)
    assert type(output) is Record
    step = float(serving(model, "two", "output").qparams().scale)
    logits = output.logits.detach()
    assert torch.allclose(logits / step, (logits / step).round(), atol=1e-3)
    # In a file there is no such class.
    quantized = convert(model, x)
    assert quantized.output_names == ("logits",)
    assert torch.equal(quantized(x)["logits"], logits)


def test_a_saved_model_gives_a_named_tuple_as_a_dict(tmp_path: Path) -> None:
    model, x = Returns(lambda a, b: Boxes(a, [b])), torch.randn(64, 4)
    prepare(model, "int8", x)
    model(x)
    quantized = convert(model, x)
    quantized.save(tmp_path / "net.pt2")
    boxes, loaded = quantized(x), QuantizedModel.load(tmp_path / "net.pt2")
    assert type(boxes) is Boxes
    assert loaded.output_names == quantized.output_names == ("scores", "labels_0")
    found = loaded(x)
    assert torch.equal(found["scores"], boxes.scores)
    assert torch.equal(found["labels"][0], boxes.labels[0])


def test_a_dataclass_as_input_is_refused_with_the_remedy() -> None:
    @dataclass
    class Batch:
        x: Tensor

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, batch: Batch) -> Tensor:
            result: Tensor = self.layer(batch.x)
            return result

    model, x = Takes(), torch.randn(8, 4)
    with pytest.raises(ValueError, match=r"takes a Batch, .*register_dataclass\(Batch\) once"):
        prepare(model, "int8", (Batch(x),))
    torch.export.register_dataclass(Batch)
    prepare(model, "int8", (Batch(x),))
    model(Batch(x))
    assert convert(model, (Batch(x),)).input_names == ("batch_x",)


def test_a_registered_dataclass_as_output_is_quantized() -> None:
    model, x = Returns(lambda a, b: Registered(b)), torch.randn(64, 4)
    prepare(model, "int8", x)
    model.train()
    model(x)
    model.eval()
    logits = model(x).logits.detach()
    plan = the_plan(model)
    assert [c for t in plan.tensors for c in t.consumers if "output:" in c]
    step = float(serving(model, "two", "output").qparams().scale)
    assert torch.allclose(logits / step, (logits / step).round(), atol=1e-3)


def test_a_tensor_that_is_returned_twice_and_used_has_one_quantizer() -> None:
    model, x = Returns(lambda a, b: (b, {"again": b})), torch.randn(16, 4)
    calibrated(model, x)
    first, second = model(x)[0], model(x)[1]["again"]
    assert torch.equal(first, second)
    outputs = [t for t in the_plan(model).tensors if any("output:" in c for c in t.consumers)]
    assert len(outputs) == 1


class MultipliesLast(nn.Module):
    """The output is made by a function, and then handed on by another one."""

    def __init__(self, hand_on: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.hand_on = nn.Linear(4, 4), hand_on

    def forward(self, x: Tensor) -> Tensor:
        return self.hand_on(self, x * self.one(x))


@pytest.mark.parametrize(
    "hand_on",
    [
        lambda _, y: y.contiguous(),
        lambda _, y: F.dropout(y, training=False),
        lambda m, y: F.dropout(y, 0.1, m.training),
    ],
    ids=["contiguous", "no dropout", "dropout in training"],
)
def test_an_output_that_is_handed_on_as_it_is_is_quantized(
    hand_on: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model, x = MultipliesLast(hand_on), torch.randn(64, 4)
    prepare(model, "int8", x)
    model.train()(x)
    output = model.eval()(x)
    [step] = convert(model, x).output_steps.values()
    on_grid = output.detach().double() / step
    assert torch.allclose(on_grid, on_grid.round(), atol=1e-3)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.one(x) * mask
        y = y + 1
        y = 2 * y
        return self.two(y + index), index + index, mask * mask


def test_integers_booleans_and_numbers_are_no_operands_to_quantize() -> None:
    inputs = torch.randn(8, 4), torch.rand(8, 4) > 0.5, torch.arange(4)
    model = Mixed()
    report = prepare(model, "int8", inputs)
    assert report.joins is not None
    assert [t.consumers for t in report.joins.tensors] == [("one",), ("two",), ("two.output:0[0]",)]
    calibrated(model, *inputs)
    found, doubled, squared = model(*inputs)
    assert (doubled.dtype, squared.dtype) == (torch.int64, torch.bool)
    with torch.no_grad():
        y = 2 * (model.one(inputs[0]) * inputs[1] + 1) + inputs[2]
        assert torch.equal(found, serving(model, "two", "output")(model.two(y)))


def test_outputs_have_the_bits_of_the_last_layer_also_where_that_stays_float() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    recipe = Recipe.from_dict({"preset": "w4a4", "exclude": ["2"]})
    plan = prepare(model, recipe, torch.ones(2, 4)).joins
    assert plan is not None
    assert {t.quantizer: t.spec.bits for t in plan.tensors} == {
        "0.input_quantizer": 8,
        "2.qat_joins.output_0_0": 8,
    }
