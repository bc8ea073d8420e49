"""QATCallback through LightningCLI."""

from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from examples import cli as example_cli
from lightning_qat import ActivationSpec, QATCallback, Recipe, Schedule, WeightSpec
from lightning_qat.recipe.recipe import PRESETS
from lightning_qat.recipe.typed_dicts import ActivationKeys, RecipeKeys, WeightKeys
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from tests.tiny_module import TinyModule, random_loader

# Lightning calls jsonargparse in a way that newer versions of it deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CALLBACK: dict[str, Any] = {
    "class_path": "lightning_qat.QATCallback",
    "init_args": {
        "recipe": {"preset": "int8", "overrides": {"type:Linear": {"weight": {"bits": 4}}}},
        "schedule": {"calibration_batches": 2, "freeze_observers": 4},
        "example_inputs": [2, 1, 8, 8],
        "exporters": [
            {"class_path": "lightning_qat_exporters.CannExporter", "init_args": {"opset": 13}},
            {"class_path": "lightning_qat_exporters.FakeQuantOnnxExporter"},
        ],
    },
}


@pytest.fixture(autouse=True)
def _no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns when it is given args and pytest has some of its own."""
    monkeypatch.setattr("sys.argv", ["train.py"])


class Trained(TinyModule):
    def train_dataloader(self) -> Any:
        return random_loader()


def run(
    tmp_path: Path, callback: dict[str, Any], *arguments: str, subcommand: str = "fit"
) -> LightningCLI:
    trainer = {
        "callbacks": [callback],
        "max_epochs": 5,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    options = ["--config", str(tmp_path / "config.yaml"), *arguments]
    return LightningCLI(
        Trained,
        args=options if subcommand == "instantiate" else [subcommand, *options],
        run=subcommand != "instantiate",
        save_config_callback=None,
        seed_everything_default=1,
    )


def test_a_yaml_file_trains_and_exports(tmp_path: Path) -> None:
    cli = run(tmp_path, CALLBACK)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, QATCallback)]  # type: ignore[attr-defined]
    assert callback.schedule == Schedule(calibration_batches=2, freeze_observers=4)
    assert callback.recipe.for_layer("head", "Linear").weight.bits == 4  # type: ignore[union-attr]
    kinds = [type(exporter) for exporter in callback.exporters]
    assert kinds == [CannExporter, FakeQuantOnnxExporter]
    assert all(result.error is None for result in callback.delivered)
    assert len(callback.delivered) == 2


def test_print_config_reads_back_as_the_same_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, CALLBACK, "--print_config")
    assert stopped.value.code == 0
    (printed,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    with pytest.raises(SystemExit):
        run(tmp_path, printed, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"] == [printed]


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": {"freeze_observer": 4}},
        {"export_from": "first"},
        {"exporters": [{"class_path": "lightning_qat_exporters.NoSuchExporter"}]},
        {"exporters": [{**CALLBACK["init_args"]["exporters"][0], "init_args": {"opst": 1}}]},
        {"recipe": {"preset": "int9"}},
        {"recipe": {"exclud": ["head"]}},
        {"recipe": {"weight": {"bit": 4}}},
        {"recipe": {"overrides": {"head": {"wieght": {"bits": 4}}}}},
        {"recipe": {"overrides": {"head": {"weight": {"bits": "many"}}}}},
        {"no_such_option": 1},
    ],
    ids=[
        "unknown key of the schedule",
        "wrong choice",
        "unknown exporter",
        "unknown option of an exporter",
        "unknown preset",
        "unknown key of the recipe",
        "unknown key of a weight",
        "unknown key of an override",
        "wrong type",
        "unknown option",
    ],
)
def test_a_wrong_configuration_stops_when_it_is_parsed(
    tmp_path: Path, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {**CALLBACK, "init_args": {**CALLBACK["init_args"], **wrong}}
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, callback)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def test_an_unknown_recipe_by_its_plain_name_stops_when_the_callback_is_made(
    tmp_path: Path,
) -> None:
    # A plain string may be a file as well; only the callback knows that it is neither.
    callback = {**CALLBACK, "init_args": {"recipe": "int9"}}
    with pytest.raises(ValueError, match=r"No recipe named 'int9'; closest names: 'int8'"):
        run(tmp_path, callback)


@pytest.mark.parametrize(
    "recipe",
    [
        "w4a8",
        {"preset": "amct", "weight": {"bits": 7}},
        {"weight": {"bits": 4, "granularity": "per_tensor"}, "joins": False, "outputs": False},
        {"exclude": ["head"], "overrides": {"features.0": None}},
        "recipe.yaml",
    ],
    ids=str,
)
def test_a_recipe_means_the_same_in_yaml_and_in_python(
    tmp_path: Path, recipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if recipe == "recipe.yaml":
        recipe = str(tmp_path / recipe)
        Path(recipe).write_text("preset: w4a4\nexclude: [head]\n")
    callback = {"class_path": "lightning_qat.QATCallback", "init_args": {"recipe": recipe}}
    cli = run(tmp_path, callback, subcommand="instantiate")
    (found,) = [c for c in cli.trainer.callbacks if isinstance(c, QATCallback)]  # type: ignore[attr-defined]
    assert found.recipe == Recipe.load(recipe)
    with pytest.raises(SystemExit):
        run(tmp_path, callback, "--print_config")
    (printed,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    again = run(tmp_path, printed, subcommand="instantiate")
    (reread,) = [c for c in again.trainer.callbacks if isinstance(c, QATCallback)]  # type: ignore[attr-defined]
    assert reread.recipe == found.recipe


def test_the_spelling_of_recipes_has_the_keys_of_the_specs() -> None:
    for keys, spec in (
        (WeightKeys, WeightSpec),
        (ActivationKeys, ActivationSpec),
        (RecipeKeys, Recipe),
    ):
        names = {field.name for field in fields(spec)}
        assert set(get_type_hints(keys)) - {"preset"} == names
    assert get_args(get_type_hints(RecipeKeys)["preset"]) == tuple(PRESETS)


def test_the_example_configuration_trains_and_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = Path(__file__).parents[2] / "examples" / "cli.yaml"
    monkeypatch.chdir(tmp_path)
    cli = example_cli.main(["fit", "--config", str(example), "--trainer.max_epochs", "2"])
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, QATCallback)]  # type: ignore[attr-defined]
    assert [result.error for result in callback.delivered] == [None, None]
    assert (tmp_path / "qat_export" / "manifest.json").is_file()
