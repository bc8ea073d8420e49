"""A weight is quantized once for several forwards, and anew whenever it has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.layers import MultiheadAttentionQAT
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.phases import set_compact
from lightning_qat.training.weights_once import weights_quantized_once

RECIPES: dict[str, Any] = {
    "follows the weight": {"joins": False, "outputs": False},
    "learned": {
        "weight": {"quantizer": "learned"},
        "activation": {"quantizer": "learned", "clip": (-3.0, 3.0)},
        "joins": False,
        "outputs": False,
    },
}


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> Any:
    return RECIPES[request.param]


@pytest.fixture(params=["fast", "compact"])
def memory(request: pytest.FixtureRequest) -> Any:
    return request.param


class Counts:
    """How often forwards have rounded values to a weight's grid."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times = 0
        monkeypatch.setattr(Tensor, "round_", self.counted(Tensor.round_))
        monkeypatch.setattr(kernels, "fake_quantize", self.counted(kernels.fake_quantize))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(x, *args, **kwargs)
            forward = torch._C._current_graph_task_id() == -1
            self.times += forward and x.shape == (5, 4) and result is not None
            return result

        return call


def one_layer(recipe: Any, memory: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5))
    prepare(model, recipe, memory=memory)
    model(torch.randn(3, 4))  # learned scales start here
    return model


def accumulated(model: nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(4):
        model(torch.randn(3, 4)).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_accumulated_gradients_are_the_same_from_one_quantization(
    recipe: Any, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one_layer(recipe, memory)
    twin = copy.deepcopy(model)
    expected = accumulated(twin)
    counts = Counts(monkeypatch)
    with weights_quantized_once(model):
        found = accumulated(model)
    assert counts.times == 1
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def optimizer_step(model: Any) -> None:
    torch.optim.SGD(model.parameters(), 0.1).step()


def loaded(model: Any) -> None:
    state = {k: v * 2 if k.endswith("0.weight") else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model[0].weight.mul_(2)


def other_memory(model: Any) -> None:
    model[0].weight.data = model[0].weight.data * 2


@pytest.mark.parametrize("change", [optimizer_step, loaded, in_place, other_memory])
def test_a_changed_weight_is_quantized_anew(recipe: Any, memory: Any, change: Any) -> None:
    model, x = one_layer(recipe, memory), torch.randn(3, 4)
    with weights_quantized_once(model):
        model(x).sum().backward()
        change(model)
        found = model.eval()(x)
    assert torch.equal(found, copy.deepcopy(model)(x))


def test_outside_nothing_is_kept(recipe: Any, memory: Any) -> None:
    model, x = one_layer(recipe, memory), torch.randn(3, 4)
    with weights_quantized_once(model.eval()):
        model(x)
    # torch cannot see this one.
    model[0].weight.data.mul_(2)  # type: ignore[index]
    assert torch.equal(model(x), copy.deepcopy(model)(x))
    assert all(m.cache is None for m in model.modules() if isinstance(m, WeightQuantizer))


def test_rows_of_a_packed_parameter_are_quantized_once_and_anew_when_it_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = MultiheadAttentionQAT(4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)
    counts = []
    quantize = WeightQuantizer._fake_quantize

    def counted(self: WeightQuantizer, weight: Tensor, known: Any) -> Tensor:
        counts.append(known is None)
        return quantize(self, weight, known)

    monkeypatch.setattr(WeightQuantizer, "_fake_quantize", counted)
    with weights_quantized_once(attention):
        for grad in (True, False, True):
            with torch.set_grad_enabled(grad):
                attention(x, x, x)
        # Query, key, value and output.
        assert sum(counts) == 4
        with torch.no_grad():
            attention.in_proj_weight.mul_(2.0)
        attention(x, x, x)
    assert sum(counts) == 7


@pytest.mark.parametrize("recipe", ["int8", "w4a4"])
def test_integers_of_a_bfloat16_weight_come_back_as_bfloat16(recipe: str) -> None:
    """With ``memory="compact"`` the second batch of an optimizer step reads the kept integers."""
    model = nn.Sequential(nn.Linear(4, 4))
    prepare(model, {**Recipe.load(recipe).to_dict(), "joins": False, "outputs": False})
    set_compact(model.to(torch.bfloat16), True)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    model(x)
    with weights_quantized_once(model):
        first, second = model(x), model(x)
        second.sum().backward()
    assert first.dtype == torch.bfloat16
    assert torch.equal(first, second)
