"""torch.compile: the same numbers to the bit, and no graph break of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from tests.join_networks import PIECES, ResNet, inputs_for


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def quantizers(model: nn.Module) -> list[ActivationQuantizer]:
    return [m for m in model.modules() if isinstance(m, ActivationQuantizer)]


def train(call: Callable[[Tensor], Tensor], model: nn.Module, batches: list[Tensor]) -> Any:
    """Outputs, ranges and gradients of some steps; ranges are committed after each, as in a fit."""
    for quantizer in quantizers(model):
        quantizer.deferred = True
    model.train()
    outputs = []
    for number, x in enumerate(batches):
        torch.manual_seed(number)  # dropout
        model.zero_grad()
        output = call(x)
        output.square().sum().backward()
        outputs.append(output.detach())
        for quantizer in quantizers(model):
            if quantizer.pending is not None:
                quantizer.commit(quantizer.pending)
    ranges = [(q.min_val.clone(), q.max_val.clone()) for q in quantizers(model)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return outputs, ranges, gradients


class Graphs(list[int]):
    """A backend that runs each graph as it is, and notes how many calls it holds."""

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph.forward


@pytest.mark.parametrize("recipe", ["int8", "w4a8"])
@pytest.mark.parametrize("planned", [True, False])
def test_prepare_leaves_the_compiler_as_it_was(recipe: str, planned: bool) -> None:
    """Whatever is compiled afterwards really is; the recipe of 4 bits looks for the last layer."""
    model, x, graphs = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6), Graphs()
    prepare(model, recipe, x if planned or recipe == "w4a8" else None)
    model.train()(x)
    other = nn.Linear(6, 6)
    torch.compile(lambda x: other(x).relu(), backend=graphs)(x)
    assert graphs == [2]
    torch.compile(model, backend=graphs, fullgraph=True)(x)
    assert len(graphs) == 2
    assert graphs[1] > 10


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def planned(name: str) -> tuple[nn.Module, list[Tensor]]:
    model = PIECES[name][0]()
    prepare(model, "int8", inputs_for(name))
    return model, [inputs_for(name) for _ in range(3)]


# Residual blocks are compiled below.
@pytest.mark.parametrize("name", PIECES)
def test_a_whole_model_compiles_without_a_graph_break(name: str) -> None:
    eager, batches = planned(name)
    model = copy.deepcopy(eager)
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    assert_same(train(compiled, model, batches), train(eager, eager, batches))
    # Without ranges and with them.
    assert len(graphs) == 2


def test_a_model_that_was_compiled_before_prepare_shares_quantizers_as_eager_does() -> None:
    """Each forward commits its own ranges here, so that a tensor quantized twice would show."""
    eager, x = PIECES["skip"][0](), inputs_for("skip")
    compiled = torch.compile(copy.deepcopy(eager), backend="eager", fullgraph=True)
    assert isinstance(compiled, nn.Module)
    for model in (eager, compiled):
        prepare(model, "int8", x)
        model.train()
    for _ in range(2):
        x = inputs_for("skip")
        assert torch.equal(eager(x), compiled(x))
    for one, other in zip(quantizers(eager), quantizers(compiled), strict=True):
        assert float(one.batches) == float(other.batches) > 0
        assert torch.equal(one.max_val, other.max_val)


@pytest.mark.parametrize(
    ("way", "backend", "numbers"),
    [("torch.compile", "aot_eager", (2,)), ("in place", "eager", (1, 2))],
)
def test_compiled_blocks_of_an_eager_model(
    way: str, backend: str, numbers: tuple[int, ...]
) -> None:
    x = inputs_for("resnet8")
    eager = ResNet()
    model = copy.deepcopy(eager)
    for number in numbers:
        if way == "in place":
            model.blocks[number].compile(backend=backend, fullgraph=True)
        else:
            model.blocks[number] = torch.compile(
                model.blocks[number], backend=backend, fullgraph=True
            )
    one, other = (prepare(m, "int8", x).joins for m in (eager, model))
    assert one is not None
    assert other is not None
    assert one.to_dict() == other.to_dict()
    batches = [inputs_for("resnet8") for _ in range(3)]
    assert_same(train(model, model, batches), train(eager, eager, batches))


class Breaks(nn.Module):
    """Its forward has a graph break of its own between two additions on neighbouring lines."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + x
        torch._dynamo.graph_break()
        y = F.relu(y)
        return self.b(y) + y


def test_a_graph_break_of_the_user_changes_nothing() -> None:
    eager, x = Breaks(), torch.randn(4, 6)
    prepare(eager, "int8", x)
    model = copy.deepcopy(eager)
    batches = [torch.randn(4, 6) for _ in range(3)]
    compiled = torch.compile(model, backend="eager")
    assert_same(train(compiled, model, batches), train(eager, eager, batches))


class Changes(nn.Module):
    """Adds to a tensor in place, through a view, after it was quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) * 1.0
        first = y * x
        y.view(-1).add_(1.0)
        second = y * x
        y.clamp_(-0.5, 0.5)
        return self.b(first + second) + y


@pytest.mark.parametrize("where", ["compiled", "inference mode"])
def test_a_change_in_place_makes_a_new_value_where_tensors_count_no_versions(where: str) -> None:
    eager, x = Changes(), torch.randn(4, 6)
    prepare(eager, "int8", x)
    batches = [torch.randn(4, 6) for _ in range(2)]
    if where == "compiled":
        model = copy.deepcopy(eager)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same(train(compiled, model, batches), train(eager, eager, batches))
    else:
        train(eager, eager, batches)
        with torch.no_grad():
            expected = eager.eval()(x)
        with torch.inference_mode():
            assert torch.equal(eager(x), expected)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.twice = False

    def forward(self, x: Tensor) -> Tensor:
        if self.twice:
            return self.a(x) * x + x
        return self.a(x) - x


def test_another_path_warns_when_it_is_compiled() -> None:
    model, x = Chooses(), torch.randn(4, 6)
    prepare(model, "int8", x)
    model.twice = True
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match=r"The call mul@forward\[\*#0\]:0 .* made in training"):
        compiled(x)
