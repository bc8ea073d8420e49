"""QATCallback through LightningCLI."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_qat import QATCallback, Schedule
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from tests.models import TinyModule, random_loader

# Lightning calls jsonargparse in a way that newer versions of it deprecate.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CALLBACK: dict[str, Any] = {
    "class_path": "lightning_qat.QATCallback",
    "init_args": {
        "recipe": {"preset": "int8", "overrides": {"type:Linear": {"weight": {"bits": 4}}}},
        "schedule": {"freeze_observers": 4},
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


def run(tmp_path: Path, callback: dict[str, Any], *arguments: str) -> LightningCLI:
    trainer = {
        "callbacks": [callback],
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "default_root_dir": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    options = ["fit", "--config", str(tmp_path / "config.yaml"), *arguments]
    return LightningCLI(Trained, args=options, save_config_callback=None, seed_everything_default=1)


def test_a_yaml_file_trains_and_exports(tmp_path: Path) -> None:
    cli = run(tmp_path, CALLBACK)
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, QATCallback)]  # type: ignore[attr-defined]
    assert callback.schedule == Schedule(freeze_observers=4)
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
        {"recipe": {"preset": "int9"}},
    ],
    ids=["unknown key", "wrong choice", "unknown class", "unknown preset"],
)
def test_a_wrong_configuration_stops_before_anything_runs(
    tmp_path: Path, wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = {**CALLBACK, "init_args": {**CALLBACK["init_args"], **wrong}}
    with pytest.raises((SystemExit, ValueError)) as stopped:
        run(tmp_path, callback)
    if isinstance(stopped.value, SystemExit):
        assert stopped.value.code == 2
        assert "error" in capsys.readouterr().err
    else:
        assert "No recipe named 'int9'; closest names: 'int8'" in str(stopped.value)
