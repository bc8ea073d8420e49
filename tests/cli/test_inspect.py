"""``lightning-qat inspect``: the same numbers of one model in every kind of file."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.checkpoint.contents import CALLBACK_KEY
from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.schedule import Phase
from tests.cli.checkpoints import write_checkpoint
from tests.cli.conftest import Command
from tests.models import trained
from tests.tiny_module import TinyModule

HEAD_IS_FLOAT = Recipe(exclude=("head",))
CONVOLUTIONS = 64 * 4 * 9 + 64 * 4 * 4 * 9
"""Multiplications of both: 64 places, 4 channels, kernels of 9, from 1 channel and from 4."""
HEAD = 4 * 3


@pytest.fixture(scope="module")
def quantized() -> QuantizedModel:
    """A ``TinyModule`` whose last layer stays float."""
    x = torch.randn(2, 1, 8, 8)
    return convert(trained(TinyModule(), x, HEAD_IS_FLOAT), x)


def files(model: QuantizedModel, folder: Path) -> dict[str, Path]:
    """The model in every kind of file with a graph."""
    model.save(folder / "net.pt2")
    cann, qdq = (export(model, name, folder / "net") for name in ("cann", "fake_quant_onnx"))
    return {
        "converted model": folder / "net.pt2",
        "deploy model": cann.files["model"],
        "fake-quant model": cann.files["fake_quant"],
        "QDQ model": qdq.files["model"],
    }


def check(command: Command, kind: str, path: Path) -> Any:
    done = command("inspect", path, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert kind in found["format"]
    assert found["files"] == {str(path): os.path.getsize(path)}
    layers = [(layer["integer"], layer["macs"]) for layer in found["layers"]]
    assert layers == [(True, 64 * 4 * 9), (True, 64 * 4 * 4 * 9), (False, HEAD)]
    assert found["integer_layers"] == 2 / 3
    assert found["integer_macs"] == CONVOLUTIONS / (CONVOLUTIONS + HEAD)
    return found


def test_every_kind_of_file_shows_the_same_share_on_integers_and_the_same_scales(
    command: Command, quantized: QuantizedModel, tmp_path: Path
) -> None:
    tensors = quantized.tensors
    expected = sorted(float(t.qparams.scale) for t in tensors.values() if t.kind == "activation")
    weights = sorted(
        s
        for t in tensors.values()
        for s in t.qparams.scale.reshape(-1).tolist()
        if t.kind == "weight"
    )
    for kind, path in files(quantized, tmp_path).items():
        found = check(command, kind, path)
        scales: dict[str, list[float]] = {"activation": [], "weight": []}
        for tensor in found["tensors"]:
            scales[tensor["kind"]] += tensor["scale"]
        assert sorted(scales["activation"]) == pytest.approx(expected, rel=1e-6)
        assert sorted(scales["weight"]) == pytest.approx(weights, rel=1e-6)


def test_a_tflite_file_shows_it_as_well(
    command: Command, quantized: QuantizedModel, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch")
    path = export(quantized, "tflite", tmp_path / "net").files["model"]
    found = check(command, "TFLite file", path)
    assert found["operators"]["CONV_2D"] + found["operators"].get("DEPTHWISE_CONV_2D", 0) == 2


def test_for_people_names_and_shares_are_in_words(
    command: Command, quantized: QuantizedModel, tmp_path: Path
) -> None:
    out = command("inspect", files(quantized, tmp_path)["QDQ model"]).out
    assert "  2 of 3 layers on integers, 99.9% of their multiplications\n" in out
    assert "  layers in float: head (Gemm)\n" in out
    assert "features.3.weight" in out
    assert "(4 channels)" in out


def test_a_checkpoint_shows_its_quantizers(command: Command, tmp_path: Path) -> None:
    module: Any = trained(TinyModule(), torch.randn(4, 1, 8, 8))
    phase = asdict(Phase("quantize", True, True, False))
    state = {"version": 1, "recipe": Recipe().to_dict(), "phase": phase, "batches_seen": 4}
    path = write_checkpoint(
        tmp_path / "last.ckpt", module, epoch=3, callbacks={CALLBACK_KEY: state}
    )
    found = command("inspect", path, "--json").json
    scales = {tensor["name"]: tensor["scale"] for tensor in found["tensors"]}
    expected = convert(module, torch.randn(4, 1, 8, 8)).tensors
    assert scales["head.input"] == [float(expected["head.input"].qparams.scale)]
    assert scales["head.weight"] == []
    assert found["layers"] is None
    assert found["facts"]["epoch"] == "3"
    assert "found at conversion" in command("inspect", path).out


def test_a_record_shows_its_factors(
    command: Command, quantized: QuantizedModel, tmp_path: Path
) -> None:
    files(quantized, tmp_path)
    found = command("inspect", tmp_path / "net_record.txt", "--json").json
    names = [tensor["name"] for tensor in found["tensors"]]
    assert names[:2] == ["features.0.input", "features.0.weight"]
    expected = quantized.tensors["features.0.weight"].qparams.scale.tolist()
    assert found["tensors"][1]["scale"] == pytest.approx(expected, rel=1e-6)


def float_model(path: Path, *, external: bool) -> Path:
    """A convolution of 3 to 5 channels over 4 x 4, an addition of two tensors, its bias apart."""
    weight = numpy_helper.from_array(np.ones((5, 3, 1, 1), np.float32), "weight")
    bias = numpy_helper.from_array(np.ones((1, 5, 1, 1), np.float32), "bias")
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "weight"], ["c"], "conv"),
            helper.make_node("Add", ["c", "bias"], ["b"], "conv.bias"),
            helper.make_node("Add", ["b", "c"], ["y"], "sum"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5, 4, 4])],
        [weight, bias],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location="net.data", size_threshold=0)
    return path


def test_a_float_model_computes_nothing_on_integers_and_its_external_data_count(
    command: Command, tmp_path: Path
) -> None:
    path = float_model(tmp_path / "net.onnx", external=True)
    found = command("inspect", path, "--json").json
    assert found["format"] == "ONNX model without QuantizeLinear"
    assert found["layers"] == [{"name": "conv", "operator": "Conv", "integer": False, "macs": 240}]
    assert found["left_float"] == ["sum"]
    assert found["integer_macs"] == 0
    assert found["operators"] == {"Add": 2, "Conv": 1}
    data = tmp_path / "net.data"
    assert found["bytes"] == path.stat().st_size + data.stat().st_size
    data.unlink()
    done = command("inspect", path)
    assert done.code == 2
    assert "no file is there. Put it beside the model" in done.err


OUTSIDE = b'record { key: "fc" value { scale_d: 1 offset_d: 300 scale_w: 1 offset_w: 0 } }'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.onnx", None, "none is there"),
        ("net.onnx", b"text", "must be an ONNX model"),
        ("net.tflite", b"\x1c\x00\x00\x00TFL3", "cut off or damaged"),
        ("net.pt2", b"text", "is not a model that QuantizedModel.save wrote"),
        ("net.ckpt", b"text", "must be a whole checkpoint"),
        ("net.ckpt", b"", "must be a whole checkpoint"),
        ("net.txt", b"text", "A record file must be a ScaleOffsetRecord"),
        ("empty.txt", b"", "A record file must name one layer at least"),
        ("grid.txt", OUTSIDE, "layer 'fc': offset_d must be in -128..127 for INT8; got 300"),
        ("other.txt", OUTSIDE.decode().encode("utf-16"), "it is UTF-16"),
        ("net.bin", b"text", "no exporter knows it"),
    ],
)
def test_bad_files_are_one_message(
    command: Command, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if name.endswith(".tflite"):
        pytest.importorskip("ai_edge_litert")
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, out, err = command("inspect", path)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_float_checkpoint_says_that_it_is_one(command: Command, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "float.ckpt", TinyModule())
    code, _, err = command("inspect", path)
    assert code == 2
    assert "it holds no quantizers" in err


def test_a_deploy_model_cut_in_half_is_one_message(
    command: Command, quantized: QuantizedModel, tmp_path: Path
) -> None:
    for path in files(quantized, tmp_path).values():
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        code, out, err = command("inspect", path)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
