"""Small models that ask for much memory, and what the commands say of files that lie."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from lightning_qat import convert_qat_model
from lightning_qat.cli.program import main
from lightning_qat_exporters.onnx_files.boundary import memory
from tests.exporters.cann.qdq_files import fc, net_file
from tests.exporters.cann.qdq_graphs import Qdq

GROWING = ("ConstantOfShape", "Expand", "Concat")


def growing(kind: str, times: int, folder: Path) -> Path:
    """A layer, and scales of 2**20 elements each, which a few bytes describe."""
    net = fc()
    size = net.constant([2**20], np.int64)
    for _ in range(times):
        if kind == "ConstantOfShape":
            made = net.node(kind, size)
        elif kind == "Expand":
            made = net.node(kind, net.constant([0.5], np.float32), size)
        else:
            half = net.node("ConstantOfShape", net.constant([2**19], np.int64))
            made = net.node(kind, half, half, axis=0)
        net.node("QuantizeLinear", "x", net.node("Add", made, net.constant(1, np.float32)))
    return net_file(net, folder, "v3")


@pytest.mark.parametrize("kind", GROWING)
def test_tensors_that_constants_ask_for_are_counted_before_more_are_made(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ALWAYS", 2**24)
    source = growing(kind, 3, tmp_path)
    assert source.stat().st_size < 3000
    with pytest.raises(ValueError, match=r"at most 16777216 bytes in memory.* makes of constants"):
        convert_qat_model(source, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["qat.onnx"]
    convert_qat_model(source, tmp_path / "net", max_bytes=2**26)


def shared(layers: int, folder: Path) -> Path:
    """Layers that share one weight of 8 x 8, of which every file has one for each."""
    net = Qdq([2, 8])
    weight = net.weight(np.eye(8), 0.5)
    y = "x"
    for index in range(layers):
        y = net.node("MatMul", net.fake(y, 0.5), weight, name=f"fc{index}")
    return net_file(net, folder, y)


def test_a_weight_that_layers_share_counts_for_each(tmp_path: Path) -> None:
    source = shared(10, tmp_path)
    # Stored are 64 bytes and the factors; written are 10 * 64 of float32.
    with pytest.raises(ValueError, match=r"with a weight of its own for each layer they take"):
        convert_qat_model(source, tmp_path / "net", max_bytes=10 * 64 * 4)
    convert_qat_model(source, tmp_path / "net", max_bytes=10 * 64 * 4 + 200)


def without_data(folder: Path, dims: tuple[int, ...] = (2, 2)) -> Path:
    path = net_file(fc(), folder, "v3")
    model = onnx.load(path)
    (weight,) = (t for t in model.graph.initializer if t.data_type == 3 and len(t.dims) == 2)
    weight.ClearField("raw_data")
    weight.dims[:] = dims
    path.write_bytes(model.SerializeToString())
    return path


def cyclic(folder: Path) -> Path:
    path = net_file(fc(), folder, "v3")
    model = onnx.load(path)
    model.graph.node[0].input[0] = model.graph.node[-1].output[0]
    path.write_bytes(model.SerializeToString())
    return path


def wrong_attribute(folder: Path) -> Path:
    path = net_file(fc(), folder, "v3")
    model = onnx.load(path)
    dequantize = next(
        n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.attribute
    )
    dequantize.attribute[0].CopyFrom(helper.make_attribute("axis", "first"))
    path.write_bytes(model.SerializeToString())
    return path


def cut(folder: Path) -> Path:
    path = net_file(fc(), folder, "v3")
    path.write_bytes(path.read_bytes()[:-5])
    return path


def field(number: int, content: bytes) -> bytes:
    """A message within a message, in protobuf's wire format."""
    size, rest = [], len(content)
    while rest > 127:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes([number << 3 | 2, *size, rest]) + content


def deep(folder: Path) -> Path:
    """Graphs within graphs, deeper than protobuf reads."""
    graph = b""
    for _ in range(60):
        # A graph's node (1) has an attribute (5) that is a graph (6).
        graph = field(1, field(5, field(6, graph)))
    path = folder / "qat.onnx"
    path.write_bytes(field(7, graph))
    return path


BAD = {
    "no data": (without_data, "values in int32_data for its shape [2, 2]; it has no data"),
    "600 million": (lambda f: without_data(f, (20_000, 30_000)), "must have 600000000 values"),
    "2**33": (lambda f: without_data(f, (2**33, 1, 1, 1)), "must have 8589934592 values"),
    "cycle": (cyclic, "a graph must have no cycle"),
    "attribute": (wrong_attribute, "breaks a rule of ONNX: Mismatched attribute type"),
    "cut": (cut, "it is truncated or something else"),
    "deep": (deep, "it is truncated or something else"),
}


@pytest.mark.parametrize("case", BAD)
def test_commands_say_in_one_message_what_is_wrong_with_a_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = BAD[case]
    path = str(make(tmp_path))
    for arguments in (
        ["convert", path, "--to", "cann", "--out", str(tmp_path / "net")],
        ["lint", path],
        ["lint", "--for", "tensorrt", path],
        ["inspect", path],
        ["verify", str(tmp_path / "net.pt2"), path],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"lightning-qat {arguments[0]}: ")
        assert message in said
        assert "Traceback" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["qat.onnx"]


def test_the_command_takes_the_limit_of_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shared(3, tmp_path)
    command = ["convert", str(source), "--to", "cann", "--out", str(tmp_path / "net")]
    assert main([*command, "--max-bytes", "100"]) == 2
    assert "allow more: max_bytes=" in capsys.readouterr().err
    assert main([*command, "--max-bytes", "5000"]) == 0
