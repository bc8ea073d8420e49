"""Recipes by name and from files."""

import json
import re
from pathlib import Path

import pytest
import yaml

from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec


@pytest.mark.parametrize(
    ("name", "weight_bits", "activation_bits", "symmetric"),
    [
        ("int8", 8, 8, False),
        ("w4a8", 4, 8, False),
        ("w4a4", 4, 4, False),
        ("a16w8", 8, 16, True),
        ("amct", 8, 8, False),
    ],
)
def test_presets(name: str, weight_bits: int, activation_bits: int, symmetric: bool) -> None:
    recipe = Recipe.load(name)
    assert recipe.weight.bits == weight_bits
    assert recipe.activation.bits == activation_bits
    assert recipe.activation.symmetric is symmetric


@pytest.mark.parametrize(("name", "bits"), [("w4a8", 8), ("w4a4", 8), ("int8", None)])
def test_presets_of_few_bits_keep_the_first_and_the_last_layer_at_8(
    name: str, bits: int | None
) -> None:
    assert Recipe.load(name).first_last == bits


@pytest.mark.parametrize("name", ["w4a8", "w4a4"])
def test_weights_of_4_bits_learn_their_scales_from_the_least_squared_error(name: str) -> None:
    weight = Recipe.load(name).weight
    assert (weight.quantizer, weight.initial) == ("learned", "mse")


def test_w4a4_learns_ranges_of_activations_as_well() -> None:
    recipe = Recipe.load("w4a4")
    assert (recipe.activation.quantizer, recipe.activation.calibration) == ("learned", "mse")


def test_w4a4_has_8_bits_for_sums_and_norms() -> None:
    assert Recipe.load("w4a4").join_bits == 8
    assert Recipe.load("int8").join_bits is None


def test_int8_is_the_default_recipe() -> None:
    assert Recipe.load("int8") == Recipe()


def test_amct_quantizes_linear_per_tensor_and_convolutions_per_channel_with_its_own_rule() -> None:
    recipe = Recipe.load("amct")
    conv, fc = recipe.for_layer("stem", "Conv2d"), recipe.for_layer("head", "Linear")
    assert conv is not None
    assert fc is not None
    assert conv.weight == WeightSpec(8, "per_channel", "arq")
    assert fc.weight == WeightSpec(8, "per_tensor", "arq")


def test_an_unknown_preset_names_the_closest_and_all() -> None:
    with pytest.raises(
        ValueError,
        match=r"No recipe named 'w4a6'; closest names: 'w4a8', 'w4a4'.*"
        r"Presets: \['a16w8', 'amct', 'int8', 'w4a4', 'w4a8'\].*ends in \.yaml",
    ):
        Recipe.load("w4a6")


RECIPE = Recipe(
    weight=WeightSpec(bits=4, quantizer="arq"),
    activation=ActivationSpec(bits=6, calibration="minmax", clip=(-1.0, 2.5), samples=4096),
    include=("encoder", "head"),
    exclude=("*.fc",),
    overrides={"head": {"weight": {"bits": 8}, "activation": {"fixed_min": True}}, "stem": None},
    first_last=6,
    join_bits=7,
)


def test_a_recipe_is_itself_again_after_primitives() -> None:
    values = RECIPE.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert Recipe.from_dict(values) == RECIPE


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
@pytest.mark.parametrize("as_path", [True, False])
def test_a_recipe_comes_from_a_file(tmp_path: Path, suffix: str, as_path: bool) -> None:
    path = tmp_path / f"recipe{suffix}"
    write = json.dumps if suffix == ".json" else yaml.safe_dump
    path.write_text(write(RECIPE.to_dict()), encoding="utf-8")
    assert Recipe.load(path if as_path else str(path)) == RECIPE


def test_a_file_changes_only_the_keys_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("preset: a16w8\nweight: {bits: 4}\nexclude: [head]\n", encoding="utf-8")
    recipe = Recipe.load(path)
    assert recipe.weight == WeightSpec(bits=4)
    assert recipe.activation == ActivationSpec(bits=16, symmetric=True)
    assert recipe.exclude == ("head",)


def test_a_mapping_changes_a_preset_and_leaves_the_preset_alone() -> None:
    changed = Recipe.load({"preset": "amct", "weight": {"bits": 4}})
    assert changed.weight == WeightSpec(bits=4, quantizer="arq")
    assert changed.overrides == Recipe.load("amct").overrides
    assert Recipe.load("amct").weight.bits == 8


def test_a_recipe_loads_as_itself() -> None:
    assert Recipe.load(RECIPE) is RECIPE


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.yaml"
    with pytest.raises(ValueError, match=re.escape(f"Recipe file {str(path)!r} does not exist")):
        Recipe.load(path)


def test_a_file_holds_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- int8\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a mapping; got list"):
        Recipe.load(path)
