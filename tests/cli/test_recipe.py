"""``lightning-qat recipe``: presets and files as YAML, everything wrong at once, AMCT's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_qat.recipe.recipe import PRESETS, Recipe
from tests.cli.conftest import Command
from tests.plain_data.test_parse_yaml import LAUGHS


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_printed_of_a_preset_is_the_preset(
    command: Command, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(command("recipe", name).out)
    assert Recipe.load(path) == PRESETS[name]
    assert Recipe.from_dict(command("recipe", name, "--json").json) == PRESETS[name]


def test_without_a_name_the_presets_are_listed(command: Command) -> None:
    lines = command("recipe").out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [*PRESETS]
    assert "4 bits, per_channel, learned" in lines[2]
    assert command("recipe", "--json").json.keys() == PRESETS.keys()


def test_amcts_simple_configuration_becomes_yaml(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "retrain.cfg"
    path.write_text('batch_num: 3\nskip_layers: "head"\n')
    values = yaml.safe_load(command("recipe", path, "--to", "yaml").out)
    assert "head" in values["exclude"]
    assert values["activation"]["calibration_batches"] == 3
    assert values["activation"]["quantizer"] == "ulq"


def test_amcts_json_becomes_yaml(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "retrain.json"
    layer = {"retrain_enable": True, "retrain_weight_config": {"dst_type": "INT4"}}
    path.write_text(json.dumps({"version": 1, "batch_num": 2, "conv": layer}))
    done = command("recipe", path)
    assert done.code == 0, done.err
    values = yaml.safe_load(done.out)
    assert values["include"] == ["conv"]
    assert values["overrides"]["conv"]["weight"]["bits"] == 4


def test_all_that_is_wrong_in_a_file_is_told_at_once(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "weight: {bit: 4, granularity: per_row}\nactivation: {bits: 99, calibration: best}\n"
        "overides: {}\njoins: 4\noverrides: {head: {weight: {bits: 1}, activation: {samples: 2}}}\n"
    )
    code, out, err = command("recipe", path)
    assert (code, out) == (2, "")
    for wrong in (
        "Recipe has no key 'overides'; closest names: 'overrides'.",
        "Recipe.weight has no key 'bit'; closest names: 'bits'.",
        "WeightSpec.granularity must be one of",
        "ActivationSpec.bits must be an int from 2 to 8, or 16; got 99.",
        "ActivationSpec.calibration must be one of",
        "Recipe.joins must be true, false or 'fused_sums'; got 4.",
        "WeightSpec.bits must be an int from 2 to 8; got 1.",
        "ActivationSpec.samples must be an int of 64 or more",
    ):
        assert wrong in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.yaml", None, "does not exist"),
        ("text.yaml", "- 1\n- 2", "it must hold a mapping; got list"),
        ("bad.yaml", "{", "while parsing"),
        ("bad.json", "{", "Expecting property name"),
        ("bad.cfg", "what: 3", "what"),
        ("twice.yaml", "joins: true\njoins: false\n", "line 2: a key must come once"),
        ("twice.json", '{"joins": true, "joins": false}', "a key must come once in its object"),
        ("tag.yaml", "!!python/object/apply:os.system [ls]", "must be plain, without a tag"),
        ("laughs.yaml", LAUGHS, "at most 300,000 values"),
        ("deep.yaml", "[" * 5000, "nested at most 50 deep"),
        ("deep.json", '{"a": ' * 100_000, "nested at most 50 deep"),
        ("digits.json", '{"joins": ' + "9" * 5000 + "}", "digits"),
        ("long.yaml", "joins: 0x" + "f" * 99, "a whole number must have at most 64 bits"),
        ("number.yaml", "overrides: {0: {weight: {bits: 4}}}", "Write it in quotes: '0'"),
        ("nan.yaml", "activation: {clip: [.nan, 1]}", "ActivationSpec.clip must be (low, high)"),
        ("words.yaml", "activation: {clip: '05'}", "ActivationSpec.clip must be (low, high)"),
        ("flags.yaml", "activation: {clip: [false, true]}", "clip must be (low, high)"),
        ("tiny.yaml", "activation: {clip: [0, 1.0e-44]}", "a scale that is a normal float32"),
        ("huge.yaml", "activation: {clip: [-1e39, 1]}", "must be a range of float32"),
        ("numbers.yaml", "exclude: [3]", "Recipe.exclude must be a list of texts; one is 3"),
        ("none.yaml", "include: ~", "Recipe.include must be a list of patterns; got None"),
        ("flag.yaml", "exclude: true", "Recipe.exclude must be a list of patterns; got True"),
        ("preset.yaml", "preset: [int8]", "preset must be one of ['int8', "),
        ("version.json", '{"version": true, "conv": {}}', "version must be 1; got True"),
        ("null.json", '{"version": 1, "conv": null}', "conv must be a mapping; got None"),
        ("algo.json", '{"conv": {"retrain_data_config": {"algo": []}}}', "algo must be one of"),
        ("w8", None, "No recipe named 'w8'; closest names: 'w4a8', 'a16w8'"),
    ],
)
def test_bad_files_are_one_message(
    command: Command, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    code, out, err = command("recipe", path if "." in name else name)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_file_in_another_encoding_says_so(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("joins: true\n", encoding="utf-16")
    assert "must be UTF-8; it is UTF-16, as PowerShell's > writes it" in command("recipe", path).err
    path.write_text("joins: true\n", encoding="utf-8-sig")
    assert command("recipe", path).code == 0


def test_of_very_many_problems_the_first_are_told(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"key{i}: {'x' * 200}\n" for i in range(30)))
    err = command("recipe", path).err
    assert "Recipe has no key 'key19'" in err
    assert "Recipe has 10 more keys that are not known." in err
    path.write_text("overrides:\n" + "".join(f"  a{i}: 4\n" for i in range(130)))
    assert "There are 30 more problems." in command("recipe", path).err
