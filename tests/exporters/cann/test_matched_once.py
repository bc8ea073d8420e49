"""The quantized graph is matched once per CANN export, and the match follows the model's copies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import convert, convert_qat_model, export
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann.normalize.normalize import with_plain_constants
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from tests.models import conv_bn_relu, inputs_for, trained


@contextmanager
def calls_of(function: Callable[..., Any]) -> Iterator[list[str]]:
    """The name of ``function``, once for every call of it, wherever it was imported to."""
    code, calls = function.__code__, list[str]()

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is code:
            calls.append(code.co_name)

    sys.setprofile(watch)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def qdq_net() -> onnx.ModelProto:
    """Q/DQ -> Conv with a quantized weight -> BatchNormalization -> Q/DQ -> Relu."""
    constants = {
        "s": np.float32(0.5),
        "z": np.int8(3),
        "w": np.arange(8, dtype=np.int8).reshape(2, 1, 2, 2),
        "ws": np.array([0.5, 0.25], np.float32),
        **{name: np.full(2, 1.0, np.float32) for name in ("gamma", "beta", "mean", "var")},
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["dq"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wr"], axis=0),
        helper.make_node("Conv", ["dq", "wr"], ["c"], name="conv"),
        helper.make_node(
            "BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"], name="norm"
        ),
        helper.make_node("QuantizeLinear", ["n", "s", "z"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "s", "z"], ["dq2"]),
        helper.make_node("Relu", ["dq2"], ["y"], name="relu"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "xy")
    initializers = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "net", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_an_export_matches_once(tmp_path: Path) -> None:
    x = inputs_for("conv_bn_relu")
    model = convert(trained(conv_bn_relu(), x), x)
    with calls_of(find_quantized) as calls:
        export(model, CannExporter(), tmp_path / "net")
    assert calls == ["find_quantized"]


@pytest.mark.parametrize("rnn", ["unrolled", "device"])
def test_a_conversion_matches_once_also_where_it_folds_a_batch_norm(
    tmp_path: Path, rnn: Any
) -> None:
    onnx.save(qdq_net(), tmp_path / "net.onnx")
    with calls_of(find_quantized) as calls:
        done = CannExporter(rnn=rnn).convert_onnx(
            tmp_path / "net.onnx", tmp_path / "out", tmp_path / "record.txt"
        )
    assert calls == ["find_quantized"]
    assert done.layers == ("conv",)
    written = onnx.load(done.files["model"])
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}


def test_the_graphs_of_an_unrolled_and_a_fused_layer_are_matched_once_each(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.rnn(x)[0]
            return y

    x = (torch.randn(2, 1, 4),)
    model = convert(trained(Net(), x), x)
    with calls_of(find_quantized) as calls, pytest.warns(UserWarning, match="best effort"):
        export(model, CannExporter(rnn="device"), tmp_path / "net")
    assert calls == ["find_quantized"] * 2


def test_a_calls_counter_sees_every_call() -> None:
    model = with_plain_constants(ir.from_proto(qdq_net()))
    with calls_of(find_quantized) as calls:
        find_quantized(model)
        find_quantized(model)
    assert len(calls) == 2


def test_a_copied_match_is_what_matching_the_copy_finds() -> None:
    found = find_quantized(with_plain_constants(ir.from_proto(qdq_net())))
    copied = found.copied()
    again = find_quantized(copied.model)
    assert copied.model is not found.model
    assert [a.source for a in copied.activations] == [a.source for a in again.activations]
    assert [a.quantizes for a in copied.activations] == [a.quantizes for a in again.activations]
    assert [a.dequantizes for a in copied.activations] == [a.dequantizes for a in again.activations]
    assert [a.name for a in copied.activations] == [a.name for a in again.activations]
    assert [layer.node for layer in copied.layers] == [layer.node for layer in again.layers]
    assert copied.layers[0].activation is copied.activations[0]


def test_not_finite_asymmetric_weights_are_named(tmp_path: Path) -> None:
    """The weight is read while it is split, before the graph is matched."""
    model = qdq_net()
    graph = model.graph
    real = np.arange(8, dtype=np.float32).reshape(2, 1, 2, 2)
    real[0] = np.nan
    graph.initializer.append(numpy_helper.from_array(real, "real"))
    graph.initializer.append(numpy_helper.from_array(np.array([3, 3], np.int8), "wz"))
    (weight,) = (n for n in graph.node if n.output[0] == "wr")
    weight.input[:] = ["wq", "ws", "wz"]
    graph.node.insert(0, helper.make_node("QuantizeLinear", ["real", "ws", "wz"], ["wq"], axis=0))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="conv: the weight must be finite; it holds NaN"):
        convert_qat_model(str(tmp_path / "net.onnx"), str(tmp_path / "out"))
