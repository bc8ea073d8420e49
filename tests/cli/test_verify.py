"""``lightning-qat verify``: files against the model that they were made of, and against another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.files.recognize import artifact_of
from tests.cli.conftest import Command
from tests.models import ResidualAdd, linear, trained


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a converted model and its files."""
    return exported(linear(), torch.randn(4, 6), tmp_path)


def exported(model: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    quantized = convert(trained(model, x), x)
    quantized.save(folder / "net.pt2")
    for target in ("cann", "fake_quant_onnx"):
        export(quantized, target, folder / "net")
    return folder


def test_files_agree_with_the_model_they_were_made_of(command: Command, results: Path) -> None:
    files = [results / f"net_{name}.onnx" for name in ("deploy_model", "fake_quant_model", "qdq")]
    done = command("verify", results / "net.pt2", *files)
    assert done.code == 0, done.err
    told = [line for line in done.out.splitlines() if "numbers equal to the bit" in line]
    # The first two files belong together.
    assert [line.partition(":")[0] for line in told] == ["cann", "fake_quant_onnx"]


def test_a_changed_scale_is_found(command: Command, results: Path) -> None:
    path = results / "net_qdq.onnx"
    model = onnx.load(path)
    scale = next(i for i in model.graph.initializer if i.name.endswith("0.weight_scale"))
    scale.CopyFrom(
        numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.1), scale.name)
    )
    onnx.save(model, path)
    done = command("verify", results / "net.pt2", path, "--json")
    assert done.code == 1
    assert done.json[0]["parameter_differences"] == [
        "0.weight: 5 of 5 values of scale differ from the model's"
    ]


def test_given_inputs_are_run(command: Command, results: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "real.npz"
    np.savez(inputs, input=np.random.default_rng(0).normal(size=(7, 6)))
    done = command("verify", results / "net.pt2", results / "net_qdq.onnx", "--inputs", inputs)
    assert done.code == 0, done.err
    assert f"7 samples ({inputs})" in done.out
    np.savez(inputs, x=np.zeros((7, 6)))
    done = command("verify", results / "net.pt2", results / "net_qdq.onnx", "--inputs", inputs)
    assert done.code == 2
    assert "must hold an array for each of the model's inputs, 'input'; it holds 'x'" in done.err


def test_a_deploy_model_alone_says_what_is_missing(command: Command, results: Path) -> None:
    (results / "net_fake_quant_model.onnx").unlink()
    done = command("verify", results / "net.pt2", results / "net_deploy_model.onnx")
    assert done.code == 0, done.err
    assert "cannot run the file: it is not beside the deploy model" in done.out


def test_files_of_another_model_are_no_traceback(
    command: Command, results: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    exported(ResidualAdd(), torch.randn(2, 4, 6, 6), other)
    for name in ("deploy_model", "qdq"):
        code, _, err = command("verify", results / "net.pt2", other / f"net_{name}.onnx")
        assert code == 2
        assert "Traceback" not in err


def test_what_no_exporter_knows_is_named(command: Command, results: Path) -> None:
    path = results / "net.txt"
    path.write_text("text")
    code, _, err = command("verify", results / "net.pt2", path)
    assert code == 2
    assert "no exporter knows it" in err
    assert "none is there" in command("verify", results / "net.pt2", results / "no.onnx").err
    path.rename(results / "text.onnx")
    assert (
        "must be an ONNX model" in command("verify", results / "net.pt2", results / "text.onnx").err
    )


def test_an_artifact_is_known_by_either_file(results: Path) -> None:
    deploy, simulation = (results / f"net_{n}_model.onnx" for n in ("deploy", "fake_quant"))
    assert artifact_of(deploy) == artifact_of(simulation)
    assert artifact_of(deploy).files == {"model": deploy, "fake_quant": simulation}
    moved = deploy.rename(results / "moved.onnx")
    assert artifact_of(moved).files == {"model": moved}


def test_a_tflite_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "net.bin"
    path.write_bytes(b"\x1c\x00\x00\x00TFL3")
    assert artifact_of(path).target == "tflite"
