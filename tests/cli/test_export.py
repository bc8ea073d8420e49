"""``lightning-qat export``: a checkpoint becomes files without training, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_qat.checkpoint.contents import CALLBACK_KEY
from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.manifest import MANIFEST
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.report.page import REPORT
from lightning_qat_exporters import CannExporter
from tests.cli.checkpoints import write_checkpoint
from tests.cli.conftest import Command
from tests.models import trained
from tests.tiny_module import TinyModule

MODULE = ("--module", "tests.tiny_module.TinyModule")
SHAPE = ("--example-inputs", "2,1,8,8")


class Unsaved(TinyModule):
    """A constructor whose arguments no checkpoint holds."""

    def __init__(self, head: nn.Module, width: int) -> None:
        pl.LightningModule.__init__(self)
        self.features, self.pool = nn.Sequential(nn.Conv2d(1, width, 3)), nn.AdaptiveAvgPool2d(1)
        self.head = head
        self.example_input_array = torch.randn(2, 1, 8, 8)


class Named(TinyModule):
    """Reads two arguments, one of them integers."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return super().forward(x) * keep.float()


def test_a_checkpoint_becomes_the_files_that_training_exports(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results"
    done = command(
        "export", checkpoint, *MODULE, "--to", "cann,fake_quant_onnx", "--out", out, *SHAPE
    )
    assert done.code == 0, done.err
    assert "cann: numbers equal to the bit" in done.out
    assert "fake_quant_onnx: numbers equal to the bit" in done.out
    assert f"  model: {out / 'tinymodule_deploy_model.onnx'}" in done.out
    assert {path.name for path in out.iterdir()} == {
        *("tinymodule_deploy_model.onnx", "tinymodule_fake_quant_model.onnx"),
        *("tinymodule_record.txt", "tinymodule_qdq.onnx", "tinymodule.pt2", MANIFEST, REPORT),
    }


def test_a_converted_model_goes_to_one_more_target(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    first = ("export", checkpoint, *MODULE, "--to", "cann", "--out", tmp_path, *SHAPE)
    assert command(*first, "--name", "net").code == 0
    out = tmp_path / "more"
    done = command(
        "export", tmp_path / "net.pt2", "--to", "fake_quant_onnx", "--out", out, "--json"
    )
    assert done.code == 0, done.err
    assert done.json == json.loads((out / MANIFEST).read_text())
    assert done.json["targets"]["fake_quant_onnx"]["agreement"]["parameters_equal"]
    assert (out / "net_qdq.onnx").is_file()


def test_the_recipe_of_the_run_is_in_the_manifest(command: Command, tmp_path: Path) -> None:
    recipe = Recipe(overrides={"head": {"weight": {"bits": 4}}})
    module: Any = trained(TinyModule(), torch.randn(4, 1, 8, 8), recipe)
    callbacks = {CALLBACK_KEY: {"version": 1, "recipe": recipe.to_dict()}}
    path = write_checkpoint(tmp_path / "last.ckpt", module, callbacks=callbacks)
    arguments = ("--to", "fake_quant_onnx", "--out", tmp_path, *SHAPE, "--json")
    assert command("export", path, *MODULE, *arguments).json["recipe"] == recipe.to_dict()


def test_arrays_are_given_by_the_names_of_the_arguments(command: Command, tmp_path: Path) -> None:
    example = {"x": torch.randn(4, 1, 8, 8), "keep": torch.ones(4, 1, dtype=torch.int64)}
    module: Any = trained(Named(), example)
    path = write_checkpoint(tmp_path / "last.ckpt", module)
    # float64, as NumPy makes them
    np.savez(
        tmp_path / "in.npz", x=np.random.default_rng(0).normal(size=(2, 1, 8, 8)), keep=[[1], [0]]
    )
    named = ("--module", f"{__name__}.Named", "--example-inputs", tmp_path / "in.npz")
    done = command("export", path, *named, "--to", "fake_quant_onnx", "--out", tmp_path)
    assert done.code == 0, done.err
    assert QuantizedModel.load(tmp_path / "named.pt2").input_names == ("x", "keep")


def test_arguments_that_no_checkpoint_holds_come_from_lightningclis_configuration(
    command: Command, tmp_path: Path
) -> None:
    pytest.importorskip("jsonargparse")
    module: Any = trained(Unsaved(nn.Linear(4, 3), 4), torch.randn(4, 1, 8, 8))
    path = write_checkpoint(tmp_path / "last.ckpt", module)
    config = tmp_path / "config.yaml"
    head = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 4, "out_features": 3}}
    model = {"class_path": f"{__name__}.Unsaved", "init_args": {"head": head, "width": 4}}
    callback = {"class_path": "lightning_qat.QATCallback", "init_args": {"dynamic_shapes": None}}
    config.write_text(json.dumps({"model": model, "trainer": {"callbacks": [callback]}}))
    to = ("--to", "fake_quant_onnx", "--out", tmp_path)
    done = command("export", path, "--config", config, *to)
    assert done.code == 0, done.err
    code, _, err = command("export", path, "--module", f"{__name__}.Unsaved", *to)
    assert code == 2
    assert "Unsaved cannot be made and loaded" in err
    assert "missing 2 required positional arguments: 'head' and 'width'" in err
    assert "--init-args" in err


def test_the_callbacks_example_and_outputs_are_those_of_the_configuration(
    command: Command, checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("jsonargparse")
    config = tmp_path / "config.yaml"
    init = {"example_inputs": [3, 1, 8, 8], "export_outputs": ["output"]}
    callback = {"class_path": "lightning_qat.QATCallback", "init_args": init}
    config.write_text(
        json.dumps({"fit": {"model": {"width": 6}, "trainer": {"callbacks": callback}}})
    )
    to = ("--to", "fake_quant_onnx", "--out", tmp_path)
    done = command("export", checkpoint, *MODULE, "--config", config, *to)
    assert done.code == 0, done.err
    (example,), _ = QuantizedModel.load(tmp_path / "tinymodule.pt2").example_inputs
    assert example.shape == (3, 1, 8, 8)


def test_one_target_that_fails_leaves_the_others(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(CannExporter, "export", fail)
    to = ("--to", "cann,fake_quant_onnx", "--out", tmp_path)
    code, out, _ = command("export", checkpoint, *MODULE, *to, *SHAPE)
    assert code == 1
    assert "cann: failed: RuntimeError: no room" in out
    assert "fake_quant_onnx: numbers equal to the bit" in out


def test_objects_in_a_checkpoint_are_loaded_when_the_file_is_trusted(
    command: Command, tmp_path: Path
) -> None:
    module: Any = trained(TinyModule(), torch.randn(4, 1, 8, 8))
    path = write_checkpoint(tmp_path / "last.ckpt", module, loop={"recipe": Recipe()})
    arguments = ("export", path, *MODULE, "--to", "fake_quant_onnx", "--out", tmp_path, *SHAPE)
    code, _, err = command(*arguments)
    assert code == 2
    assert "it holds lightning_qat.recipe.recipe.Recipe" in err
    assert "If you trust the file, add --trust." in err
    assert command(*arguments, "--trust").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "cann,tflit,cnn"], "No exporter named 'tflit'"),
        (["--to", "cann,tflit,cnn"], "No exporter named 'cnn'"),
        (["--to", "cann,cann"], "more than once"),
        (["--to", ","], "--to must name at least one target"),
        (["--to", "cann"], "is a checkpoint, whose module must be named: --module"),
        (["--to", "cann", "--module", "Net"], "must be a dotted path such as"),
        (["--to", "cann", "--module", "no.such.Net"], "cannot be imported: ModuleNotFoundError"),
        (
            ["--to", "cann", "--module", "tests.tiny_module.TinyModul"],
            "closest names: 'TinyModule'",
        ),
        (["--to", "cann", *MODULE], "has no example_input_array, so the inputs"),
        (["--to", "cann", *MODULE, "--init-args", "[1]"], "--init-args must be a mapping"),
        (["--to", "cann", *MODULE, "--init-args", "{"], "is neither JSON nor YAML"),
        (["--to", "cann", *MODULE, "--config", "no.yaml"], "no.yaml"),
        (["--to", "cann", *MODULE, "--example-inputs", "no.npz"], "with the inputs at 'no.npz'"),
        (["--to", "cann", *MODULE, "--example-inputs", "1,2,8,8"], "channels"),
        (["--to", "cann", *MODULE, "--init-args", '{"width": 5}', *SHAPE], "size mismatch"),
    ],
)
def test_what_is_wrong_is_one_message(
    command: Command, checkpoint: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    out = tmp_path / "results"
    code, printed, err = command("export", checkpoint, "--out", out, *arguments)
    assert (code, printed) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04broken"])
def test_a_file_that_is_no_checkpoint_is_named(
    command: Command, tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(content)
    code, _, err = command("export", path, *MODULE, "--to", "cann", "--out", tmp_path, *SHAPE)
    assert code == 2
    assert f"{str(path)!r} must be a whole checkpoint" in err
    path.rename(tmp_path / "net.pt2")
    code, _, err = command("export", tmp_path / "net.pt2", "--to", "cann", "--out", tmp_path)
    assert code == 2
    assert "is not a model that QuantizedModel.save wrote" in err


def test_missing_files_folders_and_float_checkpoints_are_named(
    command: Command, tmp_path: Path
) -> None:
    to = ("--to", "cann", "--out", tmp_path / "results")
    assert "no file is there" in command("export", tmp_path / "no.ckpt", *MODULE, *to).err
    assert "no converted model" in command("export", tmp_path / "no.pt2", *to).err
    assert "consolidate_checkpoint" in command("export", tmp_path, *MODULE, *to).err
    path = write_checkpoint(tmp_path / "float.ckpt", TinyModule())
    assert "it is of a float model" in command("export", path, *MODULE, *to).err


def test_a_converted_model_takes_no_options_of_checkpoints(
    command: Command, tmp_path: Path
) -> None:
    x = torch.randn(2, 1, 8, 8)
    convert(trained(TinyModule(), x), x).save(tmp_path / "net.pt2")
    to = ("--to", "cann", "--out", tmp_path)
    code, _, err = command("export", tmp_path / "net.pt2", *MODULE, *to)
    assert code == 2
    assert "is a converted model, which needs no module" in err


def test_what_libraries_print_is_not_in_the_json(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As onnxscript 0.6 does, of the rules that it has applied."""
    export = torch.onnx.export

    def talkative(*arguments: Any, **options: Any) -> Any:
        print("Applied 1 of general pattern rewrite rules.")
        return export(*arguments, **options)

    monkeypatch.setattr(torch.onnx, "export", talkative)
    target = ("--to", "fake_quant_onnx", "--out", tmp_path, *SHAPE)
    done = command("export", checkpoint, *MODULE, *target, "--json")
    assert done.json["targets"]["fake_quant_onnx"]["files"]
    assert "Applied 1" in done.err
