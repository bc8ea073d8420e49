"""What prepare leaves alone, with its reason, and what it refuses."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from lightning_qat.layers import LinearQAT, QATLayer
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.models import ResidualAdd, linear
from tests.prepare.cases import types


def skip_reason(model: nn.Module, name: str, recipe: Any = "int8") -> str:
    reasons = {s.name: s.reason for s in prepare(model, recipe).skipped}
    return reasons[name]


def test_contradicting_overrides_are_refused_before_anything_changes() -> None:
    model = linear()
    recipe = Recipe(overrides={"[0]": {"weight": {"bits": 4}}, "0*": {"weight": {"bits": 2}}})
    with pytest.raises(
        ValueError, match=r"overrides\['\[0\]'\] and Recipe.overrides\['0\*'\] contra"
    ):
        prepare(model, recipe)
    assert not any(isinstance(m, QATLayer) for m in model.modules())


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            lambda: nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
            "padding_mode must be 'zeros'; got 'reflect'",
        ),
        (
            lambda: nn.LazyLinear(2),
            "its parameters have no shape yet; run the model once before prepare",
        ),
        (lambda: nn.RNN(2, 2), "RNN has no QAT form"),
        (lambda: nn.Bilinear(2, 2, 2), "Bilinear has no QAT form"),
        (lambda: nn.EmbeddingBag(2, 2), "EmbeddingBag has no QAT form"),
        (
            lambda: nn.utils.spectral_norm(nn.MultiheadAttention(2, 1), "in_proj_weight"),
            "its in_proj_weight is computed by a hook (weight_norm or spectral_norm)",
        ),
        (lambda: LinearQAT(2, 2), "already quantized"),
    ],
)
def test_a_layer_that_cannot_be_quantized_stays_and_the_report_says_why(
    layer: Callable[[], nn.Module], reason: str
) -> None:
    model = nn.ModuleDict({"odd": layer(), "good": nn.Linear(2, 2)})
    kind = type(model["odd"])
    assert skip_reason(model, "odd") == reason
    assert type(model["odd"]) is kind
    assert type(model["good"]) is LinearQAT


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(exclude=("0",)), "excluded by the recipe (exclude: '0')"),
        (Recipe(overrides={"0": None}), "kept float by the recipe (overrides: '0': None)"),
        (Recipe(include=("2",)), "not selected by the recipe's include"),
    ],
)
def test_a_layer_that_the_recipe_keeps_float_says_so(recipe: Recipe, reason: str) -> None:
    assert skip_reason(linear(), "0", recipe) == reason


# What is refused, and that a refusal changes nothing


def refused(model: nn.Module, recipe: Any, text: str) -> None:
    before, names = types(model), list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        prepare(model, recipe)
    assert types(model) == before
    assert list(model.state_dict()) == names


def test_a_model_without_layers_is_refused() -> None:
    refused(
        nn.Sequential(nn.ReLU()),
        "int8",
        r"Nothing to quantize in Sequential: at least one layer of \['Conv1d'.*'Linear'.*\] must "
        r"be selected by the recipe\. It has no layer with weights\.",
    )


def test_a_model_with_nothing_but_skipped_layers_is_refused_with_the_reasons() -> None:
    model = nn.Sequential(nn.RNN(2, 2), nn.Linear(2, 2))
    refused(
        model,
        Recipe(exclude=("1",)),
        r"Skipped:\n  0 \(RNN\): RNN has no QAT form\n  1 \(Linear\): excluded by the recipe",
    )


def test_parameters_that_are_not_float32_are_refused_and_all_named() -> None:
    model = linear()
    model[2].half()
    refused(
        model,
        "int8",
        re.escape(
            "must be float32; got 2.weight is float16, 2.bias is float16. Call model.float()"
        ),
    )


def test_other_dtypes_in_layers_that_stay_float_are_no_matter() -> None:
    model = linear()
    model[2].half()
    prepare(model, Recipe(exclude=("2",)))
    assert type(model[0]) is LinearQAT


def test_patterns_that_match_no_layer_are_refused_with_the_closest_names() -> None:
    refused(
        ResidualAdd(),
        {"exclude": ["con1"], "overrides": {"haed": None}},
        r"(?s)'con1' in Recipe.exclude matches no layer; closest names: 'conv1'.*"
        r"'haed' in Recipe.overrides matches no layer; closest names: 'head'",
    )


def test_an_unknown_preset_is_refused() -> None:
    refused(linear(), "int88", "No recipe named 'int88'; closest names: 'int8'")
