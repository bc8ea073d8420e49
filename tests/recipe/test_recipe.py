"""Which layers a recipe selects and what it gives them: patterns, overrides, ends, and errors."""

import re
from typing import Any

import pytest

from lightning_qat.recipe.patterns import selects
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec, WeightSpec
from lightning_qat.recipe.suggest import closest_names

LAYERS = {"stem": "Conv2d", "encoder.0.conv": "Conv2d", "encoder.0.fc": "Linear", "head": "Linear"}


def selected(recipe: Recipe) -> list[str]:
    return [name for name, kind in LAYERS.items() if recipe.for_layer(name, kind) is not None]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("stem", ["stem"]),
        ("encoder", ["encoder.0.conv", "encoder.0.fc"]),
        ("encoder.*", ["encoder.0.conv", "encoder.0.fc"]),
        ("*.conv", ["encoder.0.conv"]),
        ("enc", []),
        ("*", list(LAYERS)),
        ("hea?", ["head"]),
        ("[hs]*", ["stem", "head"]),
        ("type:Linear", ["encoder.0.fc", "head"]),
        ("type:Conv*", ["stem", "encoder.0.conv"]),
        ("type:linear", []),
        ("Linear", []),
    ],
)
def test_a_pattern_selects_what_it_matches_and_everything_below(
    pattern: str, names: list[str]
) -> None:
    assert [name for name, kind in LAYERS.items() if selects(pattern, name, kind)] == names
    assert selected(Recipe(include=(pattern,))) == names
    assert selected(Recipe(exclude=(pattern,))) == [n for n in LAYERS if n not in names]


def test_exclude_wins_over_include() -> None:
    assert selected(Recipe(include=("encoder",), exclude=("*.fc",))) == ["encoder.0.conv"]


def test_a_layer_without_overrides_gets_the_recipe_s_specs() -> None:
    recipe = Recipe(weight=WeightSpec(bits=4), activation=ActivationSpec(bits=6))
    assert recipe.for_layer("stem", "Conv2d") == LayerSpec(WeightSpec(4), ActivationSpec(6))


def test_later_overrides_win_over_earlier_ones_key_by_key() -> None:
    recipe = Recipe(
        overrides={
            "encoder": {"weight": {"bits": 4, "granularity": "per_tensor"}},
            "encoder.0.fc": {"weight": {"bits": 2}, "activation": {"bits": 6}},
        }
    )
    spec = recipe.for_layer("encoder.0.fc", "Linear")
    assert spec == LayerSpec(WeightSpec(2, "per_tensor"), ActivationSpec(6))


@pytest.mark.parametrize("order", [("head", "type:Linear"), ("type:Linear", "head")])
def test_a_name_wins_over_a_type_whatever_the_order(order: tuple[str, str]) -> None:
    changes: dict[str, Any] = {
        "head": {"weight": {"bits": 3}},
        "type:Linear": {"weight": {"bits": 4}},
    }
    recipe = Recipe(overrides={pattern: changes[pattern] for pattern in order})
    specs = [recipe.for_layer(name, "Linear") for name in ("head", "encoder.0.fc")]
    assert [spec.weight.bits for spec in specs if spec] == [3, 4]


def test_none_keeps_a_layer_float_and_a_later_override_takes_it_back() -> None:
    assert selected(Recipe(overrides={"type:Linear": None})) == ["stem", "encoder.0.conv"]
    back = Recipe(overrides={"type:Linear": None, "head": {"weight": {"bits": 4}}})
    assert selected(back) == ["stem", "encoder.0.conv", "head"]
    assert back.for_layer("head", "Linear") == LayerSpec(WeightSpec(4), ActivationSpec())


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(), None),
        (Recipe(exclude=("he*",)), "excluded by the recipe (exclude: 'he*')"),
        (Recipe(overrides={"head": None}), "kept float by the recipe (overrides: 'head': None)"),
        (Recipe(include=("stem",)), "not selected by the recipe's include"),
    ],
)
def test_the_reason_why_a_layer_stays_float(recipe: Recipe, reason: str | None) -> None:
    assert recipe.why_float("head", "Linear") == reason


def test_patterns_that_match_nothing_are_all_named_with_the_closest_layers() -> None:
    recipe = Recipe(
        include=("stem", "haed"), exclude=("type:Liner",), overrides={"encodr.0.fc": {"weight": {}}}
    )
    with pytest.raises(ValueError, match="matches no layer") as caught:
        recipe.check_patterns(LAYERS)
    assert str(caught.value).splitlines() == [
        "Pattern 'haed' in Recipe.include matches no layer; closest names: 'head'.",
        "Pattern 'type:Liner' in Recipe.exclude matches no layer; closest names: 'type:Linear', "
        "'type:Conv2d'.",
        "Pattern 'encodr.0.fc' in Recipe.overrides matches no layer; closest names: "
        "'encoder.0.fc', 'encoder.0.conv'.",
    ]


CONTRADICTING = Recipe(
    exclude=("stem",),
    overrides={
        "stem": {"weight": {"bits": 4}},
        "head": {"weight": {"bits": 8}},
        "hea?": {"weight": {"bits": 4}, "activation": {"bits": 4}},
        "*.fc": {"activation": {"bits": 6}},
        "encoder.*": {"activation": {"bits": 4}},
        "type:Linear": None,
        "type:Li*": {"weight": {"bits": 2}},
    },
)


def test_overrides_that_contradict_each_other_are_all_told_with_both_patterns() -> None:
    with pytest.raises(ValueError, match="contradict") as caught:
        CONTRADICTING.check_patterns(LAYERS)
    narrower = (
        "the later of two must be the narrower one. Put the narrower one last, or name the layer "
        "itself after both: overrides["
    )
    assert str(caught.value).splitlines() == [
        "Recipe.exclude keeps float what Recipe.overrides['stem'] changes: 'stem' in exclude "
        "selects 'stem'. Drop one of the two.",
        "Recipe.overrides['type:Linear'] and Recipe.overrides['type:Li*'] contradict each other in "
        f"quantization of 'encoder.0.fc'; {narrower}'encoder.0.fc'].",
        "Recipe.overrides['*.fc'] and Recipe.overrides['encoder.*'] contradict each other in "
        f"activation.bits of 'encoder.0.fc'; {narrower}'encoder.0.fc'].",
        "Recipe.overrides['head'] and Recipe.overrides['hea?'] contradict each other in "
        f"weight.bits of 'head'; {narrower}'head'].",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        {"*": {"weight": {"bits": 4}}, "encoder": {"weight": {"bits": 8}}, "encoder.0.fc": None},
        {"encoder.0.fc": {"weight": {"bits": 4}}, "type:Linear": {"weight": {"bits": 8}}},
        {"*.fc": {"weight": {"bits": 4}}, "encoder": {"activation": {"bits": 4}}},
        {"*.fc": {"weight": {"bits": 4}}, "encoder": {"weight": {"bits": 4}}},
        {
            "*.fc": {"weight": {"bits": 4}},
            "encoder": {"weight": {"bits": 2}},
            "encoder.0.fc": {"weight": {"bits": 8}},
        },
    ],
    ids=["narrower", "name and type", "other keys", "same value", "settled by name"],
)
def test_overrides_that_narrow_each_other_pass(overrides: Any) -> None:
    Recipe(overrides=overrides).check_patterns(LAYERS)


def test_an_override_wider_than_what_is_excluded_passes() -> None:
    Recipe(exclude=("head",), overrides={"type:Linear": {"weight": {"bits": 4}}}).check_patterns(
        LAYERS
    )


# The first and the last layer

ENDS = [("stem", "Conv2d", ()), ("head", "Linear", ("classifier",))]


def bits_of(recipe: Recipe) -> dict[str, tuple[int, int] | None]:
    specs = {name: recipe.for_layer(name, kind) for name, kind in LAYERS.items()}
    return {n: s and (s.weight.bits, s.activation.bits) for n, s in specs.items()}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {"stem": (8, 8), "head": (8, 8)}),
        ({"type:Linear": {"weight": {"bits": 2}}}, {"head": (8, 8), "encoder.0.fc": (2, 4)}),
        ({"classifier": {"weight": {"bits": 3}}}, {"head": (3, 8)}),
        ({"*": {"activation": {"bits": 6}}}, {"stem": (8, 6), "encoder.0.fc": (4, 6)}),
        ({"head": {"activation": {"bits": 16, "symmetric": True}}}, {"head": (8, 16)}),
        (
            {"type:Linear": None, "head": {"weight": {"granularity": "per_tensor"}}},
            {"head": (8, 8)},
        ),
        ({"stem": None}, {"stem": None, "head": (8, 8)}),
    ],
)
def test_the_ends_have_more_bits_unless_their_name_says_otherwise(
    overrides: Any, expected: dict[str, Any]
) -> None:
    recipe = Recipe(
        weight=WeightSpec(bits=4),
        activation=ActivationSpec(bits=4),
        overrides=overrides,
        first_last=8,
    ).with_ends(ENDS)
    found = bits_of(recipe)
    assert {name: found[name] for name in expected} == expected
    assert found["encoder.0.conv"] in ((4, 4), (4, 6))


def test_the_ends_never_have_fewer_bits_than_the_others() -> None:
    recipe = Recipe(activation=ActivationSpec(bits=16, symmetric=True), first_last=4)
    assert set(bits_of(recipe.with_ends(ENDS)).values()) == {(8, 16)}


@pytest.mark.parametrize("bits", [1, 9, 16, True, "8", 8.0])
def test_the_ends_have_2_to_8_bits(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"Recipe.first_last must be an int from 2 to 8, or null"):
        Recipe(first_last=bits)


def test_patterns_that_all_match_pass() -> None:
    Recipe(include=("*",), exclude=("type:Conv2d",), overrides={"head": None}).check_patterns(
        LAYERS
    )


@pytest.mark.parametrize(
    ("word", "known", "text"),
    [
        ("bitz", ["bits", "granularity"], "closest names: 'bits'"),
        ("zzz", ["b", "a"], "known names: 'a', 'b'"),
        ("zzz", "abcdefg", "known names: 'a', 'b', 'c', 'd', 'e', ..."),
        ("zzz", [], "known names: none"),
    ],
)
def test_closest_names_or_else_the_known_ones(word: str, known: Any, text: str) -> None:
    assert closest_names(word, known) == text


# Errors


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"wieght": {}}, "Recipe has no key 'wieght'; closest names: 'weight'"),
        ({"weight": {"bit": 4}}, "Recipe.weight has no key 'bit'; closest names: 'bits'"),
        (
            {"activation": {"symetric": True}},
            "Recipe.activation has no key 'symetric'; closest names: 'symmetric'",
        ),
        (
            {"overrides": {"head": {"wheight": {}}}},
            "Recipe.overrides['head'] has no key 'wheight'; closest names: 'weight'",
        ),
        (
            {"overrides": {"head": {"weight": {"bts": 4}}}},
            "Recipe.overrides['head'].weight has no key 'bts'; closest names: 'bits'",
        ),
        ({"overrides": {"head": 4}}, "Recipe.overrides['head'] must be a mapping; got 4"),
        (
            {"overrides": {"head": {"weight": 4}}},
            "Recipe.overrides['head'].weight must be a mapping; got 4",
        ),
        ({"weight": 4}, "Recipe.weight must be a mapping; got 4"),
        ({"activation": "int8"}, "Recipe.activation must be a mapping; got 'int8'"),
        ({"overrides": ["head"]}, "Recipe.overrides must be a mapping; got ['head']"),
        ({"overrides": None}, "Recipe.overrides must be a mapping; got None"),
        ({"preset": "int9"}, "No recipe named 'int9'; closest names: 'int8'"),
        ({"include": "head"}, "Recipe.include must be a list of patterns; got the string 'head'"),
        ({"exclude": "head"}, "Write exclude=['head']"),
    ],
)
def test_a_wrong_mapping_is_refused_with_where_and_what(values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Recipe.from_dict(values)


@pytest.mark.parametrize("bits", [1, 9, 16, 4.0, "8", True])
def test_weight_bits_are_an_int_from_2_to_8(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"WeightSpec.bits must be an int from 2 to 8; got"):
        WeightSpec(bits=bits)


@pytest.mark.parametrize("bits", [1, 9, 15, 32, 8.0, "8", True])
def test_activation_bits_are_an_int_from_2_to_8_or_16(bits: Any) -> None:
    with pytest.raises(ValueError, match=r"must be an int from 2 to 8, or 16; got"):
        ActivationSpec(bits=bits, symmetric=True)


@pytest.mark.parametrize(
    ("spec", "values", "text"),
    [
        (
            WeightSpec,
            {"granularity": "channel"},
            "WeightSpec.granularity must be one of ['per_channel', 'per_tensor']; got 'channel'",
        ),
        (
            WeightSpec,
            {"quantizer": "mse"},
            "must be one of ['minmax', 'arq', 'learned', 'ulq']; got 'mse'",
        ),
        (
            ActivationSpec,
            {"calibration": "max"},
            "['moving_average', 'minmax', 'percentile', 'mse', 'entropy', 'histogram']; got 'max'",
        ),
        (ActivationSpec, {"quantizer": "x"}, "ActivationSpec.quantizer must be one of"),
        (
            ActivationSpec,
            {"symmetric": "yes"},
            "ActivationSpec.symmetric must be true or false; got 'yes'",
        ),
        (ActivationSpec, {"fixed_min": "yes"}, "ActivationSpec.fixed_min must be"),
        *(
            (ActivationSpec, {"samples": samples}, "samples must be an int of 64 or more, or null")
            for samples in (0, 63, 1e5, True, "all")
        ),
        (ActivationSpec, {"bits": 16}, "16-bit activations are symmetric on every target; set"),
        (
            ActivationSpec,
            {"fixed_min": True, "symmetric": True},
            "fixed_min pins the lower end at 0, which a symmetric range cannot have",
        ),
    ],
)
def test_values_outside_what_is_listed_are_refused(spec: Any, values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        spec(**values)


@pytest.mark.parametrize(
    "clip", [(0.1, 1.0), (-1.0, -0.1), (0.0, 0.0), (-1.0, 0.0, 1.0), (1.0, -1.0), 6.0]
)
def test_a_clip_holds_zero_and_more(clip: Any) -> None:
    with pytest.raises(ValueError, match=r"ActivationSpec.clip must be \(low, high\) with low <= "):
        ActivationSpec(clip=clip)


@pytest.mark.parametrize("clip", [(0.0, float("inf")), (float("-inf"), 1.0)])
def test_a_clip_is_finite(clip: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=r"ActivationSpec.clip must be"):
        ActivationSpec(clip=clip)


def test_a_clip_may_touch_zero_and_comes_from_a_list() -> None:
    clip: Any = [0.0, 6.0]
    assert ActivationSpec(clip=clip).clip == (0.0, 6.0)


def test_fixed_min_false_is_compatible_with_symmetric() -> None:
    assert ActivationSpec(fixed_min=False, symmetric=True).symmetric


def test_plain_names_are_looked_up_however_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"block{n}.conv" for n in range(1000)]
    recipe = Recipe(overrides={name: {"weight": {"bits": 4}} for name in names[::2]})
    matched: list[str] = []
    monkeypatch.setattr(
        "lightning_qat.recipe.recipe.selects", lambda *args: matched.append(args[0])
    )
    specs = [recipe.for_layer(name, "Conv2d") for name in names]
    assert [spec.weight.bits for spec in specs if spec] == [4, 8] * 500
    assert matched == []


def test_a_name_with_brackets_is_a_pattern() -> None:
    recipe = Recipe(exclude=("head[0]",))
    assert recipe.for_layer("head0", "Linear") is None
    assert recipe.for_layer("head[0]", "Linear") is not None
    with pytest.raises(ValueError, match="matches no layer"):
        recipe.check_patterns({"head[0]": "Linear"})
