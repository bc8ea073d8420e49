"""``lightning-qat calibrate``: a float checkpoint becomes files without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_qat import calibrate, convert
from lightning_qat.export.delivery.manifest import MANIFEST
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.report.page import REPORT
from tests.cli.checkpoints import write_checkpoint
from tests.cli.conftest import Command
from tests.models import trained
from tests.tiny_module import TinyModule, random_loader

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class WithData(TinyModule):
    """A module with a loader of its own."""

    def train_dataloader(self) -> object:
        print("making the loader")
        return random_loader(samples=16, batch_size=4)


class Shuffled(WithData):
    """The user's loader fails."""

    def train_dataloader(self) -> object:
        raise KeyError("labels")


MODULE = ("--module", "tests.cli.test_calibrate.WithData")


@pytest.fixture
def float_checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return write_checkpoint(tmp_path / "float.ckpt", WithData(width=6).eval())


def test_files_are_those_of_the_function_on_the_same_batches(
    command: Command, float_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = ("--to", "fake_quant_onnx,cann", "--out", out, "--batches", "3")
    done = command("calibrate", float_checkpoint, *MODULE, *options)
    assert done.code == 0, done.err
    assert "making the loader" not in done.out
    assert f"report: {out / REPORT}" in done.out
    targets = json.loads((out / MANIFEST).read_text())["targets"]
    assert set(targets) == {"fake_quant_onnx", "cann"}
    written = QuantizedModel.load(out / "withdata.pt2")
    reference = WithData(width=6).eval()
    reference.load_state_dict(torch.load(float_checkpoint, weights_only=True)["state_dict"])
    batches = [x for x, _ in random_loader(samples=16, batch_size=4)]
    # Ranges from the first three; the loader has four, and goes on with the fourth for the biases.
    calibrate(reference, batches[:3], correct_biases=False)
    expected = convert(reference, batches[0]).tensors
    for name, tensor in written.tensors.items():
        if tensor.kind == "activation":
            found = tensor.qparams.scale.numpy()
            np.testing.assert_allclose(found, expected[name].qparams.scale.numpy(), rtol=1e-6)


def test_json_is_the_manifest(command: Command, float_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--to", "fake_quant_onnx", "--out", tmp_path, "--batches", "2", "--json")
    done = command("calibrate", float_checkpoint, *MODULE, "--no-correct-biases", *options)
    assert done.json == json.loads((tmp_path / MANIFEST).read_text())


def test_what_cannot_be_calibrated_is_said(
    command: Command, float_checkpoint: Path, tmp_path: Path
) -> None:
    target = ("--to", "fake_quant_onnx", "--out", tmp_path)
    module: Any = trained(WithData(), torch.randn(4, 1, 8, 8))
    quantized = write_checkpoint(tmp_path / "qat.ckpt", module)
    for arguments, message in (
        ((quantized, *MODULE), "calibrate takes a float checkpoint"),
        ((float_checkpoint, "--module", "tests.tiny_module.TinyModule"), "no train_dataloader"),
        ((tmp_path / "no.ckpt", *MODULE), "no file is there"),
        ((float_checkpoint, *MODULE, "--recipe", "int9"), "No recipe named 'int9'"),
        (
            (float_checkpoint, "--module", "tests.cli.test_calibrate.Shuffled"),
            "cannot be calibrated: KeyError: 'labels'",
        ),
    ):
        done = command("calibrate", *arguments, *target)
        assert (done.code, done.out) == (2, ""), done
        assert message in done.err
