"""``lightning-qat compare``: the layer in which a file departs, by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from tests.cli.conftest import Command
from tests.models import linear, trained


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with a converted model and its QDQ file."""
    x = torch.randn(16, 6)
    quantized = convert(trained(linear(), x), x)
    quantized.save(tmp_path / "net.pt2")
    export(quantized, "fake_quant_onnx", tmp_path / "net")
    return tmp_path


def test_a_file_that_computes_what_the_model_does_is_fine(command: Command, results: Path) -> None:
    done = command("compare", results / "net.pt2", results / "net_qdq.onnx")
    assert done.code == 0, done.err
    assert "Every layer computes what the model does." in done.out


def test_the_layer_with_another_scale_is_named(command: Command, results: Path) -> None:
    path = results / "net_qdq.onnx"
    model = onnx.load(path)
    scale = next(i for i in model.graph.initializer if i.name.endswith("2.weight_scale"))
    wrong = numpy_helper.to_array(scale) * np.float32(1.5)
    scale.CopyFrom(numpy_helper.from_array(wrong, scale.name))
    onnx.save(model, path)
    done = command("compare", results / "net.pt2", path, "--json")
    assert done.code == 1
    suspected = [t["made_by"] for t in done.json["tensors"] if t["suspicion"]]
    assert suspected == ["2"]


def test_files_that_do_not_fit_are_one_message(command: Command, results: Path) -> None:
    x = torch.randn(2, 5)
    other = convert(trained(torch.nn.Sequential(torch.nn.Linear(5, 2)), x), x)
    export(other, "fake_quant_onnx", results / "other")
    for file in ("other_qdq.onnx", "no.onnx", "net.pt2"):
        code, out, err = command("compare", results / "net.pt2", results / file)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
