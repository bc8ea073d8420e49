"""Recipes that keep a budget: against brute force over all candidates."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import BudgetNotMet, Recipe, Sensitivity, sensitivity, suggest
from lightning_qat.insight.sensitivity.search import Ladders, search
from tests.insight.test_sensitivity import (
    candidates_of,
    chain,
    quantized_by,
    sqnr,
    without_first_feature,
)
from tests.models import linear

FOUR = Recipe.from_dict({"weight": {"bits": 4}, "activation": {"bits": 4}, "outputs": False})


def all_values(result: Sensitivity, choices: tuple[int | None, ...]) -> dict[Any, float]:
    """The metric of every candidate."""
    candidates, layers = candidates_of(result), [size.layer for size in result.sizes]
    return {
        chosen: candidates.measure(
            candidates.everything() | dict(zip(layers, chosen, strict=True)), str(chosen)
        )
        for chosen in itertools.product(choices, repeat=len(layers))
    }


@pytest.fixture(scope="module")
def of_chain() -> tuple[nn.Module, Tensor, Sensitivity]:
    torch.manual_seed(0)
    model, x = chain(5, 1, 3, far=4.0), without_first_feature(64)
    return model, x, sensitivity(model, FOUR, data=[x], progress=False)


@pytest.mark.parametrize("raised", [0, 1, 2, 3, 5])
def test_the_fewest_layers_are_raised(
    raised: int, of_chain: tuple[nn.Module, Tensor, Sensitivity]
) -> None:
    model, x, result = of_chain
    values = all_values(result, (4, 8))
    # What so many layers can reach at best.
    budget = max(value for c, value in values.items() if sum(b == 8 for b in c) == raised)
    good = [c for c, value in values.items() if value >= budget]
    suggestion = suggest(result, budget)
    assert suggestion.value >= budget
    assert suggestion.is_least
    assert len(suggestion.changes) == min(sum(b == 8 for b in chosen) for chosen in good)
    assert set(suggestion.changes.values()) <= {8}
    # What prepare makes of the recipe.
    made = quantized_by(model, suggestion.recipe, x)
    assert suggestion.value == pytest.approx(sqnr(model, made, x), abs=1e-4)


def test_fragile_layers_are_left_in_float(
    of_chain: tuple[nn.Module, Tensor, Sensitivity],
) -> None:
    _, x, _ = of_chain
    model = chain(5, 1, 3)
    result = sensitivity(model, "int8", data=[x], progress=False)
    suggestion = suggest(result, 30.0)
    assert suggestion.changes == {"2": None, "6": None}
    assert suggestion.recipe == Recipe(overrides={"2": None, "6": None})


@pytest.mark.parametrize("minimize", ["size", "bops"])
@pytest.mark.parametrize("budget", [5.0, 12.0])
def test_bits_are_chosen_layer_by_layer(minimize: Any, budget: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(64, 6)
    result = sensitivity(model.eval(), "int8", data=[x], bits=(8, 4, 2), progress=False)
    weights = {size.layer: size.weights for size in result.sizes}
    assert weights == {"0": 96, "2": 128, "4": 24}
    assert [size.multiplications for size in result.sizes] == [64 * w for w in weights.values()]
    values = all_values(result, (8, 4, 2))
    # Inputs have 8 bits, whatever the weights have, so BOPs are proportional to bytes here.
    cost = {c: sum(w * b for w, b in zip(weights.values(), c, strict=True)) / 8 for c in values}
    suggestion = suggest(result, budget, minimize=minimize)
    assert suggestion.is_least
    least = min(cost[c] for c, value in values.items() if value >= budget)
    assert suggestion.size == least
    assert suggestion.bops == pytest.approx(least * 8 / (248 * 128))
    assert suggestion.value >= budget


def test_a_metric_of_ones_own_has_a_budget_in_its_unit() -> None:
    model, x = chain(4, 2), without_first_feature(64)

    def closeness(quantized: nn.Module) -> float:
        return -float((quantized(x) - model(x)).abs().mean())

    result = sensitivity(model, FOUR, closeness, progress=False)
    lost = result.float_value - result.quantized_value
    assert suggest(result, lost).changes == {}
    suggestion = suggest(result, lost / 2)
    assert result.float_value - suggestion.value <= lost / 2
    assert 0 < len(suggestion.changes) < 4
    text = str(suggestion)
    assert "evaluations; no cheaper candidate does" in text
    assert all(f"  {layer}: 8 bits" in text for layer in suggestion.changes)


def test_a_budget_that_cannot_be_met_says_so_and_what_is_best(
    of_chain: tuple[nn.Module, Tensor, Sensitivity],
) -> None:
    _, _, result = of_chain
    best = max(all_values(result, (4, 8)).values())
    with pytest.raises(
        BudgetNotMet, match=r"budget of 200 cannot be met.*choices=\(8, None\)"
    ) as e:
        suggest(result, 200.0)
    assert e.value.best.value == pytest.approx(best)
    with pytest.raises(BudgetNotMet, match=r"cannot be met.*may win back the rest"):
        suggest(result, 200.0, choices=(4, None))


def test_other_keys_of_an_override_stay() -> None:
    recipe = Recipe.from_dict(
        {
            "weight": {"bits": 4},
            "overrides": {"2": {"weight": {"granularity": "per_tensor"}}},
            "outputs": False,
        }
    )
    result = sensitivity(linear().eval(), recipe, data=torch.randn(32, 6), progress=False)
    suggestion = suggest(result, result.quantized_value + 0.1, choices=(4, 8), minimize="layers")
    top = suggest(result, 30.0, most_evaluations=0)
    assert suggestion.changes
    spec = top.recipe.for_layer("2", "Linear")
    assert spec is not None
    assert (spec.weight.bits, spec.weight.granularity) == (8, "per_tensor")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"choices": (16,)}, r"choices must be ints from 2 to 8, or None for float; got 16"),
        ({"minimize": "time"}, r"minimize must be 'layers', 'size' or 'bops'; got 'time'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: Any, message: str, of_chain: tuple[nn.Module, Tensor, Sensitivity]
) -> None:
    with pytest.raises(ValueError, match=message):
        suggest(of_chain[2], 10.0, **arguments)


def test_more_bits_may_be_worse() -> None:
    """The best candidate is found although the most precise one misses the budget."""
    ladders = Ladders({"a": (4, 8), "b": (4, 8)}, lambda _, bits: float(bits == 8), lambda *_: 0.0)
    found = search(ladders, lambda bits: bits["b"] == 8 and bits["a"] == 4, most=10)
    assert found.assignment == {"a": 4, "b": 8}
    assert search(ladders, lambda bits: False, most=10) == type(found)(None, is_least=True)


def test_many_layers_take_few_evaluations() -> None:
    tested = []
    names = [f"layer{n}" for n in range(60)]
    ladders = Ladders(
        dict.fromkeys(names, (4, 8)),
        lambda _, bits: float(bits == 8),
        lambda layer, bits: float(layer in ("layer17", "layer42")) * (bits == 4),
    )

    def is_good(bits: dict[str, int | None]) -> bool:
        tested.append(copy.copy(bits))
        return bits["layer17"] == bits["layer42"] == 8

    found = search(ladders, is_good, most=500)
    assert found.assignment == dict.fromkeys(names, 4) | {"layer17": 8, "layer42": 8}
    assert found.is_least
    # Halving, taking back two steps, and all with no or one layer raised.
    assert len(tested) < 2 + 6 + 2 + 61 + 1
