"""``lightning-qat recipe``: presets and files as YAML, everything wrong at once, AMCT's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_qat.recipe.recipe import PRESETS, Recipe
from tests.cli.conftest import Command


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
    assert "4 bits, per_channel, minmax" in lines[2]
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
