"""AMCT's simple configuration, JSON configuration and layer configuration, read as recipes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from lightning_qat.layers import Conv2dQAT, LinearQAT
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.amct_cfg import parse_cfg
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec, WeightSpec

GOLDENS = Path(__file__).parents[1] / "goldens" / "amct"
ULQ = ActivationSpec(quantizer="ulq", calibration="mse")


def cfg(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "retrain.cfg"
    path.write_text(text, encoding="utf-8")
    return Recipe.load(path)


def json_config(tmp_path: Path, values: Any) -> Recipe:
    path = tmp_path / "config.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return Recipe.load(path)


def spec_of(recipe: Recipe, name: str, kind: str) -> LayerSpec:
    spec = recipe.for_layer(name, kind)
    assert spec is not None
    return spec


# The two files say the same


@pytest.mark.parametrize(
    "case",
    [
        *("conv_arq_cw", "conv_arq_pt", "conv_ulq_cw", "conv_dw", "conv_deconv"),
        *("conv_a8w4", "conv_a16w8"),
    ],
)
def test_amcts_own_simple_and_json_configurations_of_a_network_are_the_same_recipe(
    case: str,
) -> None:
    simple = Recipe.load(GOLDENS / case / "retrain.cfg")
    whole = Recipe.load(GOLDENS / case / "config.json")
    for name, kind in {"conv1": "Conv2d", "conv2": "Conv2d", "fc": "Linear"}.items():
        assert spec_of(simple, name, kind) == spec_of(whole, name, kind)


@pytest.mark.parametrize(
    ("case", "activation_bits", "weight"),
    [
        ("conv_arq_cw", 8, WeightSpec(8, "per_channel", "arq")),
        ("conv_arq_pt", 8, WeightSpec(8, "per_tensor", "arq")),
        ("conv_ulq_cw", 8, WeightSpec(8, "per_channel", "ulq")),
        ("conv_a8w4", 8, WeightSpec(4, "per_channel", "arq")),
        ("conv_a16w8", 16, WeightSpec(8, "per_channel", "arq")),
    ],
)
def test_what_amcts_own_configurations_ask(
    case: str, activation_bits: int, weight: WeightSpec
) -> None:
    spec = spec_of(Recipe.load(GOLDENS / case / "config.json"), "conv1", "Conv2d")
    assert spec.weight == weight
    assert spec.activation.bits == activation_bits
    assert spec.activation.symmetric is (activation_bits == 16)
    assert (spec.activation.quantizer, spec.activation.calibration_batches) == ("ulq", 2)


# The simple configuration


def test_an_empty_simple_configuration_is_the_amct_preset(tmp_path: Path) -> None:
    recipe = cfg(tmp_path, "# everything by default\n")
    assert recipe == Recipe.load("amct")
    assert spec_of(recipe, "c", "Conv2d") == LayerSpec(WeightSpec(quantizer="arq"), ULQ)
    assert spec_of(recipe, "f", "Linear").weight == WeightSpec(8, "per_tensor", "arq")


def test_a_layer_wins_over_its_type_and_that_over_the_global_configuration(tmp_path: Path) -> None:
    recipe = cfg(
        tmp_path,
        """
        override_layer_configs {
          layer_name: "head.fc"
          retrain_weight_quant_config { arq_retrain { dst_type: INT4 channel_wise: false } }
        }
        retrain_weight_quant_config: { ulq_retrain: { channel_wise: false } }
        override_layer_types {
          layer_type: "Conv2d"
          retrain_weight_quant_config < arq_retrain < channel_wise: true > >
        }
        """,
    )
    assert spec_of(recipe, "head.fc", "Conv2d").weight == WeightSpec(4, "per_tensor", "arq")
    assert spec_of(recipe, "stem", "Conv2d").weight == WeightSpec(8, "per_channel", "arq")
    assert spec_of(recipe, "d", "ConvTranspose2d").weight == WeightSpec(8, "per_tensor", "ulq")


def test_an_override_gives_a_whole_configuration_not_single_keys(tmp_path: Path) -> None:
    recipe = cfg(
        tmp_path,
        """
        retrain_data_quant_config { ulq_quantize { fixed_min: true dst_type: INT8
          clip_max_min { clip_max: 3.0 clip_min: -1.0 } } }
        override_layer_configs { layer_name: "a" retrain_data_quant_config { ulq_quantize {} } }
        """,
    )
    assert spec_of(recipe, "a", "Conv2d").activation == ULQ
    assert spec_of(recipe, "b", "Conv2d").activation == ActivationSpec(
        quantizer="ulq", calibration="mse", fixed_min=True, clip=(-1.0, 3.0)
    )


def test_skips_of_either_spelling_are_united(tmp_path: Path) -> None:
    recipe = cfg(
        tmp_path,
        """
        skip_layers: "a" quant_skip_layers: "b"
        skip_layer_types: "Linear" quant_skip_types: "Conv1d"
        """,
    )
    layers = {"a": "Conv2d", "b": "Conv2d", "c": "Conv2d", "d": "Linear", "e": "Conv1d"}
    assert [n for n, kind in layers.items() if recipe.for_layer(n, kind) is not None] == ["c"]


def test_a_layer_name_is_a_name_and_no_pattern(tmp_path: Path) -> None:
    recipe = cfg(tmp_path, 'skip_layers: "conv[0]" skip_layers: "x*"')
    assert recipe.for_layer("conv0", "Conv2d") is not None
    assert recipe.for_layer("x1", "Conv2d") is not None
    assert recipe.for_layer("conv[0]", "Conv2d") is None


def test_a_missing_half_may_come_from_a_type(tmp_path: Path) -> None:
    recipe = cfg(
        tmp_path,
        """
        retrain_data_quant_config { ulq_quantize { dst_type: INT16 } }
        override_layer_types { layer_type: "Conv2d"
          retrain_data_quant_config { ulq_quantize { dst_type: INT8 } } }
        override_layer_configs { layer_name: "a"
          retrain_weight_quant_config { arq_retrain { dst_type: INT4 } } }
        """,
    )
    spec = spec_of(recipe, "a", "Conv2d")
    assert (spec.activation.bits, spec.weight.bits) == (8, 4)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("batch_nmu: 1", r"1:1 : .*no field named \"batch_nmu\""),
        ("batch_num: 1\nbatch_num: 2", r"2:\d+ : .*should not have multiple \"batch_num\""),
        (
            "retrain_data_quant_config { ulq_quantize { dst_type: INT7 } }",
            "no value named INT7",
        ),
        ("retrain_data_quant_config {", "got 1:2[0-9] : "),
        ("batch_num: 0", "batch_num must be a whole number of 1 or more; got 0"),
        (
            "retrain_data_quant_config { ulq_quantize { dst_type: INT4 } }",
            r"dst_type must be one of \['INT8', 'INT16'\]; got 'INT4'",
        ),
        (
            "retrain_weight_quant_config { arq_retrain { dst_type: INT16 } }",
            r"dst_type must be one of \['INT8', 'INT4'\]; got 'INT16'",
        ),
        (
            "retrain_weight_quant_config { arq_retrain {} ulq_retrain {} }",
            r"algo must be one of \['arq_retrain', 'ulq_retrain'\]; got 'arq_retrain and ulq",
        ),
        (
            'override_layer_configs { layer_name: "a" } override_layer_configs { layer_name: "a" }',
            "override_layer_configs must name each layer_name once; 'a' comes 2 times",
        ),
        ("override_layer_types {}", "override_layer_types must have a layer_type; one has none"),
        (
            'override_layer_types { layer_type: "Linear" '
            "retrain_weight_quant_config { arq_retrain { channel_wise: true } } }",
            "channel_wise must be false for Linear",
        ),
        (
            "retrain_data_quant_config { ulq_quantize { dst_type: INT16 } } "
            "retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }",
            r"must be a pair of \['8/8', '16/8', '8/4'\] bits; got 16/4",
        ),
        (
            'override_layer_configs { layer_name: "a" '
            "retrain_data_quant_config { ulq_quantize { dst_type: INT16 } } } "
            "retrain_weight_quant_config { arq_retrain { dst_type: INT4 } }",
            r"override_layer_configs 'a': .* got 16/4",
        ),
        (
            "retrain_data_quant_config { ulq_quantize { dst_type: INT16 fixed_min: true } }",
            "fixed_min pins the lower end at 0, which the symmetric grid of INT16 cannot have",
        ),
    ],
)
def test_a_simple_configuration_that_breaks_a_rule_is_refused(
    tmp_path: Path, text: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)Recipe file .*retrain\.cfg': .*{reason}"):
        cfg(tmp_path, text)


@pytest.mark.parametrize(
    ("clips", "reason"),
    [
        ("clip_max: -1.0 clip_min: -2.0", r"clip_max must be above 0 and finite; got -1\.0"),
        ("clip_max: 0.0 clip_min: -2.0", r"clip_max must be above 0 and finite; got 0\.0"),
        ("clip_max: inf clip_min: -2.0", r"clip_max must be above 0 and finite; got inf"),
        ("clip_max: 1.0 clip_min: 0.5", r"clip_min must be below 0 and finite; got 0\.5"),
        ("clip_max: 1.0 clip_min: 0.0", r"clip_min must be below 0 and finite; got 0\.0"),
        ("clip_max: 1.0 clip_min: nan", r"clip_min must be below 0 and finite; got nan"),
        ("clip_max: 1.0", "must give clip_max and clip_min together; it gives clip_max alone"),
    ],
)
def test_clips_have_the_right_signs(tmp_path: Path, clips: str, reason: str) -> None:
    text = f"retrain_data_quant_config {{ ulq_quantize {{ clip_max_min {{ {clips} }} }} }}"
    with pytest.raises(ValueError, match=reason):
        cfg(tmp_path, text)


def test_all_broken_rules_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="breaks rules") as caught:
        cfg(
            tmp_path,
            "batch_num: -1 retrain_data_quant_config { ulq_quantize { dst_type: INT4 } } "
            "override_layer_configs {}",
        )
    told = str(caught.value)
    assert [word in told for word in ("batch_num", "INT4", "layer_name")] == [True] * 3


def test_text_means_what_it_means_to_protobuf() -> None:
    text = 'batch_num : 0x10; skip_layers: \'a\' "b", skip_layers: ["c\\n"] # comment'
    assert parse_cfg(text) == {"batch_num": 16, "skip_layers": ["ab", "c\n"]}


# The JSON configuration

LAYER = {
    "retrain_enable": True,
    "retrain_data_config": {"algo": "ulq_quantize", "dst_type": "INT8"},
    "retrain_weight_config": {"algo": "arq_retrain", "channel_wise": True, "dst_type": "INT8"},
}


def test_only_enabled_layers_are_quantized(tmp_path: Path) -> None:
    off = LAYER | {"retrain_enable": False}
    recipe = json_config(tmp_path, {"version": 1, "batch_num": 3, "a.0": LAYER, "b": off})
    layers = {"a.0": "Conv2d", "b": "Conv2d", "c": "Linear"}
    assert [n for n, kind in layers.items() if recipe.for_layer(n, kind) is not None] == ["a.0"]
    assert spec_of(recipe, "a.0", "Conv2d").activation.calibration_batches == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": 2}, "version must be 1; got 2"),
        ({"batch_num": "2"}, "batch_num must be a whole number of 1 or more; got '2'"),
        ({"batch_num": True}, "batch_num must be a whole number of 1 or more; got True"),
        ({"a": 1}, "a must be a mapping; got 1"),
        ({"a": LAYER | {"retrain_enabel": 1}}, "a has no key 'retrain_enabel'; closest names: 're"),
        ({"a": LAYER | {"retrain_enable": 1}}, "a.retrain_enable must be true or false; got 1"),
        (
            {"a": {"retrain_data_config": {"algo": "ulq"}}},
            "a.retrain_data_config.algo must be one of ['ulq_quantize']; got 'ulq'",
        ),
        (
            {"a": {"retrain_weight_config": {"chanel_wise": True}}},
            "a.retrain_weight_config has no key 'chanel_wise'; closest names: 'channel_wise'",
        ),
        (
            {"a": {"retrain_data_config": {"clip_max": "1", "clip_min": -1.0}}},
            "clip_max must be above 0 and finite; got '1'",
        ),
        (
            {
                "a": {
                    "retrain_data_config": {"dst_type": "INT16"},
                    "retrain_weight_config": {"dst_type": "INT4"},
                }
            },
            "a: activation and weight must be a pair of ['8/8', '16/8', '8/4'] bits; got 16/4",
        ),
        ({"a": LAYER | {"retrain_enable": False}}, "retrain_enable must be true for one layer"),
    ],
)
def test_a_json_configuration_that_breaks_a_rule_is_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        json_config(tmp_path, {"version": 1, "batch_num": 1, "a": LAYER} | change)


def test_a_json_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a key must come once in its object; \['batch_num'\]"):
        json_config(tmp_path, '{"version": 1, "batch_num": 1, "batch_num": 2}')


def test_a_damaged_json_file_is_named_with_line_and_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json': .*line 1 column 12"):
        json_config(tmp_path, '{"version":')


def test_a_recipe_in_json_is_still_a_recipe(tmp_path: Path) -> None:
    assert json_config(tmp_path, Recipe.load("amct").to_dict()) == Recipe.load("amct")


def test_a_configuration_of_another_network_names_the_closest_layers(tmp_path: Path) -> None:
    recipe = json_config(tmp_path, {"version": 1, "fc1": LAYER})
    with pytest.raises(ValueError, match=r"'fc1' in .* matches no layer; closest names: 'fc'"):
        prepare(nn.ModuleDict({"fc": nn.Linear(2, 2)}), recipe)


# The configuration of a layer


def layer_config(data: Any, weight: Any) -> dict[str, Any]:
    return {"retrain_data_config": data, "retrain_weight_config": weight}


def test_a_layer_takes_amcts_configuration() -> None:
    config = layer_config(
        {
            "dst_type": "INT8",
            "batch_num": 10,
            "fixed_min": False,
            "clip_min": -0.5,
            "clip_max": 1.5,
        },
        {"dst_type": "INT4", "weights_retrain_algo": "ulq_retrain", "channel_wise": False},
    )
    for layer in (
        Conv2dQAT(1, 2, 3, config=config),
        Conv2dQAT.from_float(nn.Conv2d(1, 2, 3), config=config),
        LinearQAT(2, 3, config=config),
    ):
        assert layer.input_quantizer.spec == ActivationSpec(  # type: ignore[union-attr]
            quantizer="ulq",
            calibration="mse",
            fixed_min=False,
            clip=(-0.5, 1.5),
            calibration_batches=10,
        )
        assert layer.weight_quantizer.spec == WeightSpec(4, "per_tensor", "ulq")  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["retrain_data_config", "retrain_weight_config"])
def test_what_a_layers_configuration_leaves_out_is_amcts_default(part: str) -> None:
    conv, fc = Conv2dQAT(1, 2, 3, config={part: {}}), LinearQAT(1, 2, config={part: {}})
    assert conv.input_quantizer.spec == ULQ  # type: ignore[union-attr]
    assert conv.weight_quantizer.spec == WeightSpec(8, "per_channel", "arq")  # type: ignore[union-attr]
    assert fc.weight_quantizer.spec == WeightSpec(8, "per_tensor", "arq")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (layer_config({}, {"channel_wise": True}), "channel_wise must be false for Linear"),
        (layer_config({"batch_num": 0}, {}), "retrain_data_config.batch_num must be a whole"),
        (layer_config({"algo": "ulq_quantize"}, {}), "retrain_data_config has no key 'algo'"),
        (layer_config(None, {}), "retrain_data_config must be a mapping; got None"),
        (
            layer_config({}, {"weights_retrain_algo": "arq"}),
            "weights_retrain_algo must be one of ['arq_retrain', 'ulq_retrain']; got 'arq'",
        ),
        (layer_config({}, {}) | {"batch_num": 1}, "config has no key 'batch_num'"),
        (layer_config({"dst_type": "INT16"}, {"dst_type": "INT4"}), "got 16/4"),
    ],
)
def test_a_layers_configuration_that_breaks_a_rule_is_refused(config: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        LinearQAT(2, 3, config=config)
