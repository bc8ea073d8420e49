"""``lightning-qat sensitivity``: what the layers of a user's project cost, and a recipe."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml

from lightning_qat import Recipe, Sensitivity, prepare
from lightning_qat.checkpoint.contents import CALLBACK_KEY
from tests.cli.checkpoints import write_checkpoint
from tests.cli.conftest import Command

pytest.importorskip("jsonargparse")

PROJECT = '''
"""What a user's project looks like. The answer is the sign of the first of four features."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split


class Data(pl.LightningDataModule):
    """The last feature is large: with 4 bits nothing is left of the first one."""

    def __init__(self, batch_size: int, large: float = 30.0) -> None:
        super().__init__()
        self.batch_size, self.large = batch_size, large

    def setup(self, stage: str) -> None:
        x = torch.randn(96, 4, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)
        x[:, 3] *= self.large
        # Another split each time.
        self.val, _ = random_split(TensorDataset(x, (x[:, 0] > 0).long()), [64, 32])

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, self.batch_size)


class Net(pl.LightningModule):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            # The first feature's positive and negative part; the larger one wins.
            self.first.weight[0, 0], self.first.weight[1, 0] = 1.0, -1.0
            self.second.weight[1, 0], self.second.weight[0, 1] = 1.0, 1.0

    def forward(self, x):
        return self.second(F.relu(self.first(x)))

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        print("validating")
        self.logger.experiment.add_scalar("anything", 1.0)
        self.log("val_acc", (logits.argmax(1) == y).float().mean())
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_nan", torch.tensor(float("nan")))


class Parts(Net):
    """validation_step calls a part of the module, and not the module itself."""

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.second(F.relu(self.first(x))).argmax(1) == y).float().mean())


class NoForward(Parts):
    def forward(self, x, mask):
        return super().forward(x * mask)


class WithData(Net):
    def val_dataloader(self):
        data = Data(32)
        data.setup("validate")
        return data.val_dataloader()


class Failing(Net):
    def validation_step(self, batch, batch_idx):
        raise KeyError("labels")
'''


class Project(NamedTuple):
    """A folder with a project in a file ``project.py``.

    Args:
        folder: The folder.
        config: Its LightningCLI configuration.
        checkpoint: Of a float ``Net``.
        w4a4: A file with a recipe of 4 bits, also for the first and the last layer.
    """

    folder: Path
    config: Path
    checkpoint: Path
    w4a4: Path

    def configured(self, **sections: Any) -> Path:
        """Another configuration."""
        path = self.folder / "other.yaml"
        path.write_text(yaml.safe_dump(sections))
        return path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    (tmp_path / "project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "project", raising=False)
    config = tmp_path / "config.yaml"
    data = {"class_path": "project.Data", "init_args": {"batch_size": 16}}
    config.write_text(yaml.safe_dump({"model": model("Net"), "data": data}))
    net = importlib.import_module("project").Net()
    recipe = tmp_path / "w4a4.yaml"
    recipe.write_text("{preset: w4a4, first_last: null}")
    return Project(tmp_path, config, write_checkpoint(tmp_path / "float.ckpt", net), recipe)


def model(name: str) -> dict[str, Any]:
    """The section of the configuration for a class of the project."""
    return {"class_path": f"project.{name}", "init_args": {"width": 3}}


def test_the_layer_that_costs_the_accuracy_is_first(command: Command, project: Project) -> None:
    done = command(
        *("sensitivity", project.checkpoint, "--config", project.config),
        *("--recipe", project.w4a4, "--metric", "val_acc", "--json"),
    )
    assert done.code == 0, done.err
    found = Sensitivity.from_dict(done.json)
    assert (found.metric, found.float_value) == ("val_acc", 1.0)
    assert found.ranking[0].layer == "first"
    # The first feature is below half a step of 4 bits: class 0 for every sample.
    assert found.ranking[0].drop > 0.3
    assert {row.layer: row.drop for row in found.rows}["second"] < 0.1


def test_without_a_metric_the_outputs_are_compared(command: Command, project: Project) -> None:
    done = command("sensitivity", project.checkpoint, "--config", project.config)
    assert done.code == 0, done.err
    head, columns, first = done.out.splitlines()[:3]
    assert head.startswith("SQNR (dB): float inf, all quantized ")
    assert columns.split() == ["layer", "kind", "bits", "SQNR", "(dB)", "noise", "/", "signal"]
    assert first.split()[:3] == ["first", "Linear", "8/8"]


def test_a_recipe_that_keeps_the_budget_is_written(command: Command, project: Project) -> None:
    recipe, rows = project.folder / "recipe.yaml", project.folder / "rows.json"
    done = command(
        *("sensitivity", project.checkpoint, "--config", project.config, "--recipe", project.w4a4),
        *("--metric", "val_acc", "--budget", "0.1", "--write", recipe, "--save", rows, "--json"),
    )
    assert done.code == 0, done.err
    suggestion = done.json["suggestion"]
    assert suggestion["changes"] == {"first": 8}
    assert suggestion["is_met"]
    assert suggestion["value"] >= 0.9
    written = Recipe.load(recipe)
    assert written == Recipe.from_dict(suggestion["recipe"])
    spec = written.for_layer("first", "Linear")
    assert spec is not None
    assert (spec.weight.bits, spec.activation.bits) == (8, 8)
    assert Sensitivity.load(rows).metric == "val_acc"
    assert command("recipe", recipe).code == 0


def test_a_budget_that_is_not_met_says_the_best(command: Command, project: Project) -> None:
    recipe = project.folder / "recipe.yaml"
    # Steps of 8 bits are larger than some of the first features.
    hard = {"class_path": "project.Data", "init_args": {"batch_size": 16, "large": 3000.0}}
    config = project.configured(model=model("Net"), data=hard)
    call = ("sensitivity", project.checkpoint, "--config", config, "--recipe", project.w4a4)
    call = (*call, "--metric", "val_acc", "--budget", "0.01", "--write", recipe)
    done = command(*call)
    assert done.code == 1
    assert "The budget of 0.01 cannot be met; the best of them gives val_acc 0." in done.err
    assert "The best candidate: val_acc 0." in done.out
    assert not recipe.exists()
    # The remedy that the message gives.
    assert "--bits 8,float" in done.err
    done = command(*call, "--bits", "8,float", "--json")
    assert done.code == 0, done.err
    assert done.json["suggestion"]["changes"] == {"first": None}
    assert Recipe.load(recipe).overrides["first"] is None


def test_a_loss_is_minimized(command: Command, project: Project) -> None:
    call = ("sensitivity", project.checkpoint, "--config", project.config, "--recipe", project.w4a4)
    found = Sensitivity.from_dict(
        command(*call, "--metric", "val_loss", "--minimize", "--json").json
    )
    assert found.metric == "-val_loss"
    assert found.float_value < 0
    assert found.ranking[0].layer == "first"
    assert found.ranking[0].drop == pytest.approx(found.float_value - found.ranking[0].value)
    assert found.ranking[0].drop > 0


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    command: Command, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    call = ("sensitivity", project.checkpoint, "--config", project.config, "--plot", "rows.svg")
    code, out, err = command(*call)
    assert (code, out) == (2, "")
    assert "pip install 'lightning-qat[report]'" in err


def test_measurements_are_drawn(command: Command, project: Project) -> None:
    pytest.importorskip("matplotlib")
    plot = project.folder / "rows.svg"
    call = ("sensitivity", project.checkpoint, "--config", project.config, "--plot", plot)
    assert command(*call).code == 0
    assert "SQNR (dB), noise / signal by layer" in plot.read_text()


def test_all_but_one_and_several_bits(command: Command, project: Project) -> None:
    call = ("sensitivity", project.checkpoint, "--config", project.config, "--limit-batches", 2)
    done = command(*call, "--mode", "all-but", "--bits", "8,4", "--json")
    assert done.code == 0, done.err
    found = Sensitivity.from_dict(done.json)
    assert found.mode == "all_but"
    layers = [(row.layer, row.bits) for row in found.rows if row.kind == "Linear"]
    assert layers == [("first", 8), ("first", 4), ("second", 8), ("second", 4)]


def test_a_run_goes_on_where_another_has_ended(
    command: Command, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = project.folder / "rows.json"
    call = ("sensitivity", project.checkpoint, "--config", project.config, "--metric", "val_acc")
    assert command(*call, "--resume", rows).code == 0
    # The data module draws another split in every process, if it may.
    torch.manual_seed(1)
    held = json.loads(rows.read_text())
    held["rows"][0]["value"] = 0.125
    rows.write_text(json.dumps(held))
    done = command(*call, "--resume", rows, "--json")
    assert done.code == 0, done.err
    assert done.json["rows"][0]["value"] == 0.125
    done = command(*call, "--resume", rows, "--recipe", project.w4a4)
    assert done.code == 2
    assert "or another path as --resume." in done.err


def test_a_qat_checkpoint_is_measured_with_its_own_recipe(
    command: Command, project: Project
) -> None:
    net = importlib.import_module("project").Net()
    x = torch.randn(16, 4)
    prepare(net, project.w4a4, x)
    net.train()
    for _ in range(200):
        net(x)
    callbacks = {CALLBACK_KEY: {"recipe": Recipe.load(project.w4a4).to_dict()}}
    path = write_checkpoint(project.folder / "qat.ckpt", net, callbacks=callbacks)
    call = ("sensitivity", path, "--config", project.config, "--json")
    done = command(*call)
    assert done.code == 0, done.err
    assert done.json["recipe"] == Recipe.load(project.w4a4).to_dict()
    done = command(*call, "--recipe", "int8")
    assert done.code == 2
    assert "Leave out --recipe, or name the float checkpoint." in done.err
    weights = write_checkpoint(project.folder / "weights.ckpt", net)
    done = command("sensitivity", weights, "--config", project.config)
    assert done.code == 2
    assert "Name it: --recipe." in done.err
    assert command("sensitivity", weights, *call[2:], "--recipe", project.w4a4).code == 0


def test_classes_that_the_configuration_does_not_name_are_options(
    command: Command, project: Project
) -> None:
    config = project.configured(fit={"model": {"width": 3}, "data": {"batch_size": 64}})
    call = ("sensitivity", project.checkpoint, "--config", config, "--module", "project.Net")
    done = command(*call)
    assert done.code == 2
    assert "--datamodule package.file.Class" in done.err
    done = command(*call, "--datamodule", "project.Data")
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", ["Parts", "WithData"])
def test_other_ways_to_write_a_module(command: Command, project: Project, name: str) -> None:
    sections: dict[str, Any] = {"model": model(name)}
    if name == "Parts":
        sections["data"] = {"class_path": "project.Data", "init_args": {"batch_size": 16}}
    config = project.configured(**sections)
    done = command("sensitivity", project.checkpoint, "--config", config, "--metric", "val_acc")
    assert done.code == 0, done.err
    assert "val_acc: float 1, all quantized" in done.out


DATA = {"class_path": "project.Data", "init_args": {"batch_size": 16}}


@pytest.mark.parametrize(
    ("sections", "options", "message"),
    [
        ({}, ("--metric", "acc"), "must log 'acc' in validation; it logs 'val_acc', 'val_loss'"),
        ({}, ("--metric", "val_nan"), "'val_nan' must be a finite number; got nan (measured: the"),
        ({"data": None}, (), "Net has no val_dataloader, so its data must be named: --datamodule"),
        (
            {"data": 3},
            ("--datamodule", "project.Data"),
            "['data'] must be a mapping or null; got 3",
        ),
        ({"data": {**DATA, "class_path": "project.Net"}}, (), "does not fit Net"),
        ({"data": {"class_path": "project.Net"}}, (), "must be a LightningDataModule; got Net"),
        ({"data": {"class_path": "project.Data"}}, (), "missing 1 required positional argument"),
        ({"model": model("Failing")}, (), "Failing cannot be validated: KeyError: 'labels'"),
        ({"model": model("NoForward")}, (), "must call the module itself, self(x)"),
        ({}, ("--minimize",), "--minimize is of a metric"),
        ({}, ("--write", "recipe.yaml"), "--write needs the budget"),
        ({}, ("--budget", "nan"), "--budget must be a finite number"),
        ({}, ("--bits", "8,16"), "must be numbers from 2 to 8, or float"),
        ({}, ("--save", "nowhere/rows.json"), "there is no folder 'nowhere'"),
        ({}, ("--recipe", "w4a5"), "w4a5"),
    ],
)
def test_what_is_wrong_is_one_message(
    command: Command,
    project: Project,
    sections: dict[str, Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    config = project.configured(**({"model": model("Net"), "data": DATA} | sections))
    code, out, err = command("sensitivity", project.checkpoint, "--config", config, *options)
    assert (code, out) == (2, "")
    assert message in " ".join(err.split())
    assert "Traceback" not in err
