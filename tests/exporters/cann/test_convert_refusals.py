"""Files and paths that convert_qat_model refuses, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import UnsupportedByTarget, convert_qat_model
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.qdq_files import fc, net_file, saved
from tests.exporters.cann.qdq_graphs import Qdq


def last(net: Qdq) -> str:
    return f"v{len(net.nodes) - 1}"


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (fc(scale=0.0), r"q: a scale must be positive.*got np.float32\(0.0\) \(tensor 'x'\)"),
        (fc(scale=-0.5), r"q: a scale must be positive.*-0.5"),
        (fc(scale=np.nan), r"q: a scale must be positive.*nan"),
        (fc(scale=np.inf), r"q: a scale must be positive.*inf"),
        (fc(scale=1e-39), r"q: a scale must be positive, and it and its reciprocal normal"),
        (fc(other_scale=0.25), r"q: .*must share scale and zero point; 'dq' has others"),
        (fc(scale=[0.5, 0.25, 1.0], zero=[0] * 3), r"q: an activation must have one.*got 3 scales"),
        (fc(scale_w=0.0), r"must be positive normal float32; got np.float32\(0.0\)"),
        (fc(scale_w=np.nan), r"must be positive normal float32; got np.float32\(nan\)"),
        (fc(scale_w=[0.5, -1.0]), r"must be positive normal float32; got np.float32\(-1.0\)"),
        (fc(scale_w=[0.5, 1, 2]), r"as many as its axis 0 is long; got 3 scales \(tensor 'c"),
        (fc(scale=1e-20, scale_w=1e-20), r"fc: scale_d \* scale_w must be positive normal"),
    ],
)
def test_factors_that_cannot_be_meant_are_refused(net: Qdq, match: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedByTarget, match=match):
        convert_qat_model(net_file(net, tmp_path, last(net)), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["qat.onnx"]


def test_a_quantizelinear_without_its_partner_is_refused(tmp_path: Path) -> None:
    net = fc()
    net.nodes[1] = helper.make_node("Cast", ["v0"], ["v1"], name="cast", to=TensorProto.FLOAT)
    with pytest.raises(UnsupportedByTarget, match=r"q: its integers are read by 'cast' \(Cast\)"):
        convert_qat_model(net_file(net, tmp_path, last(net)), tmp_path / "out")


def test_factors_and_weights_that_are_computed_are_refused_or_listed(tmp_path: Path) -> None:
    net = fc()
    # From the data; what is computed from constants is a constant.
    net.nodes.insert(0, helper.make_node("ReduceMax", ["x"], ["computed"], name="max", keepdims=0))
    net.nodes[1].input[1] = net.nodes[2].input[1] = "computed"
    with pytest.raises(UnsupportedByTarget, match=r"q: the scale must be a constant"):
        convert_qat_model(net_file(net, tmp_path, "v3"), tmp_path / "out")

    net = Qdq([2, 2])
    y = net.node("MatMul", net.fake("x", 0.5), net.fake(net.node("Neg", "x"), 0.5), name="fc")
    done = convert_qat_model(net_file(net, tmp_path, y), tmp_path / "out")
    assert (done.layers, done.joins) == ((), ("fc",))
    assert done.left_float == (
        "'fc': its input is quantized and its weight is no quantized constant.",
    )


def test_scales_of_a_bias_along_an_axis_that_it_has_not_are_refused(tmp_path: Path) -> None:
    """A DequantizeLinear without ``axis`` has its scales along the second one."""
    net = Qdq([1, 2, 4, 4])
    factors = net.constant([3, -5], np.int32), net.constant([0.25, 0.5], np.float32)
    bias = net.node("DequantizeLinear", *factors, name="bias")
    weight = net.weight(np.ones((2, 2, 1, 1)), 0.5)
    y = net.node("Conv", net.fake("x", 0.5), weight, bias, name="conv")
    with pytest.raises(
        UnsupportedByTarget, match=r"shape \[2\] must have .*as its axis 1 is long; got 2 scales"
    ):
        convert_qat_model(net_file(net, tmp_path, y), tmp_path / "out")


def test_a_convolution_without_a_window_is_listed(tmp_path: Path) -> None:
    """ONNX checks the axes of a weight only where the shape of the input is known."""
    net = Qdq(None)
    y = net.node("Conv", net.fake("x", 0.5), net.weight([[1, 2], [3, 4]], 0.5), name="conv")
    y = net.node("Relu", y)
    y = net.node("MatMul", net.fake(y, 0.5), net.weight([[1, 2], [3, 4]], 0.5), name="fc")
    done = convert_qat_model(net_file(net, tmp_path, y), tmp_path / "out")
    assert done.layers == ("fc",)
    assert done.left_float == (
        "'conv': its weight must have two axes and one or more of a window; got shape [2, 2].",
    )


def test_how_nodes_are_spread_over_devices_is_not_written(tmp_path: Path) -> None:
    source = net_file(fc(), tmp_path, "v3")
    proto = onnx.load(source)
    if "device_configurations" not in proto.graph.node[0].DESCRIPTOR.fields_by_name:
        pytest.skip(f"onnx {onnx.__version__} has no device configurations")
    proto.graph.node[0].device_configurations.add()
    done = convert_qat_model(saved(proto, tmp_path), tmp_path / "out")
    assert not any(n.device_configurations for n in onnx.load(done.files["model"]).graph.node)


def graph_file(folder: Path, nodes: Sequence[onnx.NodeProto], **options: Any) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.ones(2, np.float32), "w")],
    )
    imports = [helper.make_opsetid("", options.get("opset", 13))]
    return saved(helper.make_model(graph, opset_imports=imports, ir_version=8), folder)


def relu(source: str, result: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [source], [result], name=name)


def cut(folder: Path) -> Path:
    path = net_file(fc(), folder, "v3")
    path.write_bytes(path.read_bytes()[:-7])
    return path


def text(folder: Path) -> Path:
    (folder / "qat.onnx").write_text("This is no model.")
    return folder / "qat.onnx"


def empty(folder: Path) -> Path:
    (folder / "qat.onnx").write_bytes(b"")
    return folder / "qat.onnx"


def short_data(folder: Path) -> Path:
    path = graph_file(folder, [relu("w", "y", "a")])
    model = onnx.load(path)
    model.graph.initializer[0].raw_data = b"1234567"
    return saved(model, folder)


def external(folder: Path, location: str = "w.bin", size: int = 8) -> Path:
    path = graph_file(folder, [relu("w", "y", "a")])
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    if size:
        (folder / "w.bin").write_bytes(b"1" * size)
    path.write_bytes(model.SerializeToString())
    return path


UNREADABLE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "text": (text, r"must be an ONNX model; it is truncated or something else"),
    "truncated": (cut, r"must be an ONNX model; it is truncated or something else"),
    "empty": (empty, r"with an opset and nodes; it has no nodes"),
    "missing": (lambda folder: folder / "no.onnx", r"must be an ONNX model at .*no file is there"),
    "float": (
        lambda folder: graph_file(folder, [relu("x", "y", "a")]),
        r"must have QuantizeLinear and DequantizeLinear nodes; .* is a float model",
    ),
    "old": (
        lambda folder: graph_file(folder, [relu("x", "y", "a")], opset=9),
        r"opset must be from 10, the first with QuantizeLinear, to \d+.* has 9",
    ),
    "unsorted": (
        lambda folder: graph_file(folder, [relu("m", "y", "a"), relu("x", "m", "b")]),
        r"node 'a' \(Relu\) reads the tensor 'm', which 'b' \(Relu\) makes only later",
    ),
    "cyclic": (
        lambda folder: graph_file(folder, [relu("m", "y", "a"), relu("y", "m", "b")]),
        r"node 'a' \(Relu\) reads the tensor 'm', which 'b' \(Relu\) makes from its own output",
    ),
    "dangling": (
        lambda folder: graph_file(folder, [relu("m", "y", "a")]),
        r"node 'a' \(Relu\) reads the tensor 'm', which nothing makes",
    ),
    "made twice": (
        lambda folder: graph_file(folder, [relu("x", "y", "a"), relu("x", "y", "b")]),
        r"the node 'b' \(Relu\) makes 'y', which is there already",
    ),
    "no output": (
        lambda folder: graph_file(folder, [relu("x", "z", "a")]),
        r"Nothing in .* makes the output 'y'",
    ),
    "wrong type": (
        lambda folder: net_file(fc(zero=0, dtype=np.int32), folder, "v3"),
        r"breaks a rule of ONNX: .*node name: q\): y_zero_point .* type: tensor\(int32\)",
    ),
    "short data": (short_data, r"tensor 'w' .* must have 8 bytes .*; it has 7"),
    "data missing": (
        lambda folder: external(folder, size=0),
        r"tensor 'w' .* has its data in .*w.bin'; no file is there",
    ),
    "data short": (lambda folder: external(folder, size=5), r"tensor 'w' .*; the file ends at 5"),
    "data elsewhere": (
        lambda folder: external(folder, location="../w.bin"),
        r"External data must lie beside the model; the tensor 'w' .* names '../w.bin'",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_files_that_are_no_quantized_model_are_refused(case: str, tmp_path: Path) -> None:
    make, match = UNREADABLE[case]
    source = make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        convert_qat_model(source, tmp_path / "out" / "net")
    assert not (tmp_path / "out").exists()


def test_nothing_to_convert_is_an_error_that_says_why(tmp_path: Path) -> None:
    net = Qdq([1, 2])
    y = net.node("MatMul", "x", net.weight([[1, 2], [3, 4]], 0.5), name="weight_only")
    with pytest.raises(ValueError, match=r"'weight_only': its weight is quantized and its input"):
        convert_qat_model(net_file(net, tmp_path, y), tmp_path / "out")


def test_paths_that_cannot_be_written_are_refused_before_anything_is(tmp_path: Path) -> None:
    source = net_file(fc(), tmp_path, "v3")
    (tmp_path / "net_deploy_model.onnx").mkdir()
    with pytest.raises(IsADirectoryError, match=r"net_deploy_model.onnx' must be a file to write"):
        convert_qat_model(source, tmp_path / "net")
    with pytest.raises(PermissionError, match=r"qat.onnx' is not a folder that can be written"):
        convert_qat_model(source, source / "net")
    with pytest.raises(ValueError, match=r"must not replace the model"):
        convert_qat_model(source, tmp_path / "other", source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net_deploy_model.onnx", "qat.onnx"]


def test_all_files_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> str:
        raise OSError("disk full")

    monkeypatch.setattr("lightning_qat_exporters.cann.write_files.format_record", fail)
    source = net_file(fc(), tmp_path, "v3")
    with pytest.raises(OSError, match="disk full"):
        convert_qat_model(source, tmp_path / "net", tmp_path / "record.txt")
    assert [p.name for p in tmp_path.iterdir()] == ["qat.onnx"]


def test_a_target_is_a_name_or_an_exporter_with_options(tmp_path: Path) -> None:
    source = net_file(fc(), tmp_path, "v3")
    done = convert_qat_model(source, tmp_path / "net", target=CannExporter(opset=13))
    assert onnx.load(done.files["model"]).opset_import[0].version == 13
    with pytest.raises(
        ValueError, match=r"one that takes ONNX models, such as 'cann'; 'fake_quant_onnx'"
    ):
        convert_qat_model(source, tmp_path / "net", target="fake_quant_onnx")
