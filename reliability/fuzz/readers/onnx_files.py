"""Small ONNX files for the readers of them: of our exporter, and written node by node."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.convert_onnx import convert_qat_model
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import CannExporter, FakeQuantOnnxExporter
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_protobuf import mutate_protobuf

_BESIDE = "weights.bin"


def mutate_onnx(content: bytes, generator: random.Random) -> bytes:
    """Change fields of the model, seldom bytes of the file."""
    if generator.random() < 0.1:
        return mutate_bytes(content, generator)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return mutate_bytes(content, generator)
    mutate_protobuf(model, generator)
    return bytes(model.SerializeToString())


def write_qdq(folder: Path) -> list[Path]:
    """Write QDQ files with the operators that conversion knows."""
    paths = []
    for name, model in _exported().items():
        prefix = folder / name
        paths.append(FakeQuantOnnxExporter().export(model, prefix).files["model"])
    for name, made in {
        "layers": _layers(),
        "moves": _moves(),
        "folding": _folding(),
        "nested": _nested(),
    }.items():
        onnx.save(made, folder / f"{name}.onnx")
        paths.append(folder / f"{name}.onnx")
    onnx.save(
        _layers(),
        folder / "outside.onnx",
        save_as_external_data=True,
        location=_BESIDE,
        size_threshold=0,
    )
    return [*paths, folder / "outside.onnx"]


def write_deploy(folder: Path, sources: Sequence[Path]) -> list[Path]:
    """Write deploy files of QDQ files, and one with device nodes."""
    files = [convert_qat_model(source, folder / source.stem).files for source in sources]
    recurrent = CannExporter(rnn="device").export(_exported()["recurrent"], folder / "device")
    return [recurrent.files["model"], *(made["model"] for made in files)]


@cache
def _exported() -> dict[str, QuantizedModel]:
    torch.manual_seed(0)
    return {
        "convnet": _converted(_ConvNet(), 1, 2, 6, 6),
        "recurrent": _converted(_Lstm(), 1, 2, 3),
    }


def _converted(net: nn.Module, *shape: int) -> QuantizedModel:
    x = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    prepare(net, example_inputs=x)
    net(x)
    return convert(net.eval(), x)


class _ConvNet(nn.Module):
    """A residual block, depthwise and transposed convolutions, pools, concat and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(4, 2, 2, stride=2)
        self.fc = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = torch.cat([x + self.depthwise(x), x], 1)[:, :4]
        x = nn.functional.max_pool2d(self.up(x), 2)
        y: Tensor = self.fc(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return y


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y


class _Graph:
    """A model written node by node; every method returns the name of a tensor."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, array: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.y"], name, **attributes))
        return f"{name}.y"

    def pair(self, x: str, scale: float = 0.25, zero: int = 3) -> str:
        factors = [self.constant(scale), self.constant(zero, np.int8)]
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, *factors), *factors)

    def weight(self, *shape: int, axis: int = 0) -> str:
        integers = np.arange(np.prod(shape)).reshape(shape) % 120 - 60
        scale = np.linspace(0.01, 0.02, shape[axis])
        parts = self.constant(integers, np.int8), self.constant(scale)
        return self.node("DequantizeLinear", *parts, axis=axis)

    def model(self, x: Sequence[int | str], *outputs: str, opset: int = 17) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        return onnx.shape_inference.infer_shapes(model)


def _layers() -> onnx.ModelProto:
    """Layers of every kind, with biases of both kinds."""
    net = _Graph()
    y = net.node(
        "Conv", net.pair("x"), net.weight(4, 2, 3, 3), net.constant(_half(4)), pads=[1] * 4
    )
    weight = net.weight(4, 1, 3, 3)
    y = net.node("Conv", net.pair(net.node("Relu", y)), weight, group=4, auto_pad="SAME_UPPER")
    y = net.node("ConvTranspose", net.pair(y), net.weight(4, 3, 2, 2, axis=1), strides=[2, 2])
    y = net.node("GlobalAveragePool", net.pair(y))
    y = net.node("Flatten", net.pair(y))
    bias = net.node("DequantizeLinear", net.constant([5, -6], np.int32), net.constant(0.01))
    y = net.node("Gemm", y, net.weight(2, 3), bias, transB=1)
    y = net.node(
        "Add", net.node("MatMul", net.pair(y), net.weight(2, 5, axis=1)), net.constant(_half(5))
    )
    return net.model([1, 2, 4, 4], net.pair(y))


def _moves() -> onnx.ModelProto:
    """Joins, moves of integers and attention."""
    net = _Graph()
    a = net.pair("x")
    b = net.pair(net.node("Transpose", a, perm=[0, 2, 1]))
    products = net.node("MatMul", a, b)
    softmax = net.pair(
        net.node("Softmax", net.node("Mul", products, net.constant(0.5))), 0.01, -128
    )
    y = net.node("MatMul", softmax, a)
    y = net.node("Concat", net.pair(y), net.pair(net.node("Sub", a, net.pair(y))), axis=2)
    y = net.node("Reshape", net.pair(y), net.constant([1, 1, 4, 8], np.int64))
    y = net.node("MaxPool", y, kernel_shape=[2, 2], strides=[1, 1])
    y = net.node("Resize", net.pair(y), "", net.constant([1, 1, 2, 2]), mode="nearest")
    y = net.node("Pad", net.pair(y), net.constant([0, 0, 1, 1] * 2, np.int64))
    ends = (net.constant([value], np.int64) for value in (0, 4, 2))
    y = net.node("Slice", net.pair(y), *ends)
    pooled = net.node("AveragePool", net.pair(y), kernel_shape=[2, 2])
    y = net.node("Clip", pooled, net.constant(0.0), net.constant(6.0))
    return net.model([1, 4, 4], net.pair(y))


def _folding() -> onnx.ModelProto:
    """Scales and weights that constants determine, batch norm, zero points that leave int8."""
    net = _Graph()
    real = net.constant(np.linspace(-1, 1, 18).reshape(2, 1, 3, 3))
    scale = net.node(
        "Div", net.node("ReduceMax", net.node("Abs", real), keepdims=0), net.constant(127)
    )
    zero = net.node("ConstantOfShape", net.constant([], np.int64))
    zero = net.node("Cast", zero, to=TensorProto.INT8)
    weight = net.node(
        "DequantizeLinear", net.node("QuantizeLinear", real, scale, zero), scale, zero
    )
    y = net.node("Conv", net.pair("x"), weight)
    stats = (net.constant(values) for values in (_half(2), _half(2), _half(2), [1, 2]))
    y = net.node("BatchNormalization", y, *stats)
    shape = net.node("Constant", value_ints=[2, 2])
    other = net.node("Expand", net.constant([[200]], np.uint8), shape)
    factors = net.constant(0.1), net.constant(7, np.uint8)
    y = net.node("GlobalMaxPool", y)
    y = net.node("Reshape", net.pair(y), net.constant([1, 2], np.int64))
    y = net.node("MatMul", y, net.node("DequantizeLinear", other, *factors))
    return net.model(["batch", 1, 4, 4], net.pair(y))


def _nested() -> onnx.ModelProto:
    """A function that quantizes, and a condition."""
    net = _Graph()
    y = net.node("MatMul", net.pair("x"), net.weight(2, 2))
    model = net.model([1, 2], "z")
    imports = [helper.make_opsetid("", 17)]
    body = [
        helper.make_node("QuantizeLinear", ["a", "s"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s"], ["b"]),
    ]
    model.functions.append(helper.make_function("own", "Pair", ["a", "s"], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid("own", 1))
    types = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
    branch = helper.make_graph([helper.make_node("Neg", [y], ["t"])], "branch", [], types)
    other = helper.make_graph([helper.make_node("Abs", [y], ["t"])], "other", [], types)
    condition = numpy_helper.from_array(np.asarray(True), "condition")
    model.graph.initializer.extend(
        [condition, numpy_helper.from_array(np.array(0.5, np.float32), "s")]
    )
    model.graph.node.extend(
        [
            helper.make_node(
                "If", ["condition"], ["i"], "if", then_branch=branch, else_branch=other
            ),
            helper.make_node("Pair", ["i", "s"], ["z"], "pair", domain="own"),
        ]
    )
    return model


def _half(count: int) -> NDArray[np.float32]:
    return np.full(count, 0.5, np.float32)
