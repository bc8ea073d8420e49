"""Lint of QDQ files for TensorRT: a valid file passes, and each broken rule is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import cli
from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.models import NETWORKS, inputs_for, trained

Edit = Callable[[onnx.ModelProto], None]


class Net:
    """A QDQ graph, node by node."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, kind: str, name: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}.y"], name, **attributes))
        return f"{name}.y"

    def pair(self, value: str, name: str, scale: float = 0.5) -> str:
        numbers = (
            self.constant(f"{name}.scale", np.float32(scale)),
            self.constant(f"{name}.zero", np.int8(0)),
        )
        quantized = self.node("QuantizeLinear", f"{name}.q", value, *numbers)
        return self.node("DequantizeLinear", f"{name}.dq", quantized, *numbers)

    def weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        count = shape[axis]
        numbers = (
            self.constant(f"{name}.integers", np.ones(shape, np.int8)),
            self.constant(f"{name}.scale", np.full(count, 0.5, np.float32)),
            self.constant(f"{name}.zero", np.zeros(count, np.int8)),
        )
        return self.node("DequantizeLinear", f"{name}.dq", *numbers, axis=axis)


def valid() -> onnx.ModelProto:
    """Residual addition, concatenation, transposed convolution and MatMul, paired as documented."""
    net = Net()
    x = net.pair("x", "input")
    bias = net.constant("b", np.ones(4, np.float32))
    y = net.node("Conv", "conv", x, net.weight("w1", (4, 4, 1, 1), 0), bias)
    y = net.pair(net.node("Add", "add", y, x), "sum")
    z = net.pair(net.node("Conv", "other", y, net.weight("w2", (4, 4, 1, 1), 0)), "branch")
    y = net.pair(net.node("Concat", "cat", y, z, axis=1), "cat")
    y = net.node("ConvTranspose", "up", y, net.weight("w3", (8, 3, 1, 1), 1))
    y = net.node("MatMul", "fc", net.pair(y, "last"), net.weight("w4", (2, 5), 1))
    graph = helper.make_graph(
        net.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        net.constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


def lint(model: onnx.ModelProto, folder: Path) -> list[tuple[str, str, str, str]]:
    onnx.save(model, folder / "net.onnx")
    found = FakeQuantOnnxExporter(for_runtime="tensorrt").lint(str(folder / "net.onnx"))
    return [(f.severity, f.node, f.must, f.got) for f in found]


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (n for n in model.graph.node if n.name == name)
    return found


def store(**arrays: Any) -> Edit:
    """Replace initializers; ``__`` in a name is a dot."""

    def apply(model: onnx.ModelProto) -> None:
        for name, array in arrays.items():
            (tensor,) = (t for t in model.graph.initializer if t.name == name.replace("__", "."))
            tensor.CopyFrom(numpy_helper.from_array(np.asarray(array), tensor.name))

    return apply


def feed(name: str, index: int, value: str) -> Edit:
    """Give a node another input."""

    def apply(model: onnx.ModelProto) -> None:
        node(model, name).input[index] = value

    return apply


def axis(name: str, value: int) -> Edit:
    def apply(model: onnx.ModelProto) -> None:
        node(model, name).attribute[0].i = value

    return apply


def without_zero_point(model: onnx.ModelProto) -> None:
    for name in ("input.q", "input.dq"):
        del node(model, name).input[2]


def insert(kind: str, before: str, *constants: str, **attributes: Any) -> Edit:
    """Put a node in front of a node's first input."""

    def apply(model: onnx.ModelProto) -> None:
        target = node(model, before)
        made = helper.make_node(kind, [target.input[0], *constants], ["new"], "new", **attributes)
        model.graph.node.insert(list(model.graph.node).index(target), made)
        target.input[0] = "new"

    return apply


def weight_as_input(model: onnx.ModelProto) -> None:
    store(w1__scale=np.float32(0.5), w1__zero=np.int8(0))(model)
    (integers,) = (t for t in model.graph.initializer if t.name == "w1.integers")
    model.graph.initializer.remove(integers)
    kind, shape = TensorProto.INT8, [4, 4, 1, 1]
    model.graph.input.append(helper.make_tensor_value_info("w1.integers", kind, shape))


def int32_bias(model: onnx.ModelProto) -> None:
    for name, array in (("b32", np.ones(4, np.int32)), ("b.scale", np.full(4, 0.25, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    made = helper.make_node("DequantizeLinear", ["b32", "b.scale"], ["b.real"], "bias.dq", axis=0)
    model.graph.node.insert(0, made)
    node(model, "conv").input[2] = "b.real"


def opset_21(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 21


def wide(model: onnx.ModelProto) -> None:
    """QuantizeLinear to 16 bits, which ONNX has from opset 21."""
    opset_21(model)
    store(input__zero=np.int16(0))(model)


def float_weight(model: onnx.ModelProto) -> None:
    weight = numpy_helper.from_array(np.ones((2, 5), np.float32), "real")
    model.graph.initializer.append(weight)
    feed("fc", 1, "real")(model)


QUANTIZES = "TensorRT quantizes to INT8, INT4 and FP8 alone"
BOTH = (
    "data and weight must both come from DequantizeLinear, else the operator is computed in float"
)
BROKEN: list[tuple[str, Edit, tuple[str, str, str, str]]] = [
    (
        "unsigned",
        store(input__zero=np.uint8(0)),
        ("error", "input.q", QUANTIZES, "UINT8"),
    ),
    (
        "16 bits",
        wide,
        ("error", "input.q", QUANTIZES, "INT16"),
    ),
    (
        "no zero point is unsigned",
        without_zero_point,
        (
            "error",
            "input.q",
            QUANTIZES,
            "UINT8, the type of a QuantizeLinear without zero point",
        ),
    ),
    ("bias", int32_bias, ("error", "bias.dq", QUANTIZES, "INT32")),
    (
        "zero point",
        store(input__zero=np.int8(-3)),
        ("error", "input.q", "the zero point must be 0", "-3"),
    ),
    (
        "zero point of a weight's channel",
        store(w1__zero=np.array([0, 0, 2, 0], np.int8)),
        ("error", "w1.dq", "the zero point must be 0", "2"),
    ),
    (
        "fewer zero points than scales",
        store(w1__zero=np.int8(0)),
        ("error", "w1.dq", "there must be as many zero points as scales", "1 and 4"),
    ),
    (
        "scale of 0",
        store(input__scale=np.float32(0)),
        ("error", "input.q", "all scales must be positive", "0"),
    ),
    (
        "computed scale",
        feed("input.q", 1, "x"),
        ("error", "input.q", "the scale must be a constant", "one that is computed"),
    ),
    (
        "activations per channel",
        store(input__scale=np.full(4, 0.5, np.float32), input__zero=np.zeros(4, np.int8)),
        (
            "error",
            "input.q",
            "activations must have one scale; only weights have one per channel",
            "4 scales",
        ),
    ),
    (
        "axis of another size",
        axis("w3.dq", 0),
        (
            "error",
            "w3.dq",
            "there must be a scale per output channel",
            "3 scales on axis 0 of [8, 3, 1, 1]",
        ),
    ),
    (
        "axis of the inputs",
        axis("w1.dq", 1),
        (
            "error",
            "conv",
            "the scales of its weight must be those of the output channels, axis 0",
            "axis 1",
        ),
    ),
    (
        "a computation on integers",
        insert("Clip", "input.dq", "input.zero", "input.zero"),
        (
            "error",
            "new",
            "DequantizeLinear alone reads what QuantizeLinear gives",
            "Clip behind 'input.q'",
        ),
    ),
    (
        "weight that is an input",
        weight_as_input,
        (
            "warning",
            "conv",
            "the weight of a convolution must be a constant",
            "one that is computed",
        ),
    ),
    ("float data", feed("other", 0, "add.y"), ("warning", "other", BOTH, "no pair on the data")),
    (
        "float weight",
        float_weight,
        ("warning", "fc", BOTH, "no pair on the weight"),
    ),
    (
        "float residual",
        feed("add", 1, "x"),
        (
            "warning",
            "add",
            "one branch of a residual addition must be quantized, else the convolution fused with "
            "it gives float",
            "two float branches",
        ),
    ),
    (
        "float branch of a concatenation",
        feed("cat", 0, "add.y"),
        (
            "warning",
            "cat",
            "all branches of a concatenation must be quantized, or none",
            "1 of 2 with a pair",
        ),
    ),
    (
        "two scales in a concatenation",
        store(branch__scale=np.float32(0.25)),
        (
            "advice",
            "cat",
            "branches of a concatenation should share one scale, else each is requantized",
            "2 scales",
        ),
    ),
    (
        "opset",
        opset_21,
        ("warning", "opset_import", "TensorRT 10.0 and 10.1 read opsets 9 to 20", "opset 21"),
    ),
]


def test_a_valid_file_has_no_findings(tmp_path: Path) -> None:
    assert lint(valid(), tmp_path) == []


@pytest.mark.parametrize(
    ("edit", "finding"), [pytest.param(edit, found, id=name) for name, edit, found in BROKEN]
)
def test_each_broken_rule_is_named(
    edit: Edit, finding: tuple[str, str, str, str], tmp_path: Path
) -> None:
    model = valid()
    edit(model)
    found = lint(model, tmp_path)
    assert finding in found
    # Other findings are of the other half of the pair, or of what reads it.
    assert {severity for severity, *_ in found} <= {finding[0], "warning"}


def test_a_pair_between_convolution_and_addition_is_advice(tmp_path: Path) -> None:
    model = valid()
    made = Net()
    paired = made.pair("conv.y", "extra")
    model.graph.initializer.extend(made.constants)
    place = list(model.graph.node).index(node(model, "add"))
    for new in reversed(made.nodes):
        model.graph.node.insert(place, new)
    node(model, "add").input[0] = paired
    assert lint(model, tmp_path) == [
        (
            "advice",
            "add",
            "a pair between a convolution and a residual addition keeps TensorRT from fusing the "
            "two into one kernel",
            "a pair behind 'conv'",
        )
    ]


def test_odd_int4_weights_are_named(tmp_path: Path) -> None:
    x = torch.randn(4, 5)
    recipe = Recipe(weight=WeightSpec(bits=4), activation=ActivationSpec(symmetric=True))
    model = convert(trained(torch.nn.Sequential(torch.nn.Linear(5, 4)), x, recipe), x)
    exporter = FakeQuantOnnxExporter(for_runtime="tensorrt", int4_weights=True, opset=21)
    path = export(model, exporter, tmp_path / "net").files["model"]
    must = "the last size of an INT4 tensor must be even"
    assert (must, "5") in [(f.must, f.got) for f in exporter.lint(path)]


@pytest.mark.parametrize("network", ["conv_bn_relu", "depthwise", "linear_3d"])
def test_our_files_for_tensorrt_have_no_findings(network: str, tmp_path: Path) -> None:
    x = inputs_for(network)
    recipe = Recipe(activation=ActivationSpec(symmetric=True))
    model = convert(trained(NETWORKS[network][0](), x, recipe), x)
    exporter = FakeQuantOnnxExporter(for_runtime="tensorrt")
    assert exporter.lint(export(model, exporter, tmp_path / "net").files["model"]) == ()


def test_the_command_line_lints_for_tensorrt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = valid()
    onnx.save(model, tmp_path / "net.onnx")
    arguments = ["lint", "--for", "tensorrt", str(tmp_path / "net.onnx")]
    assert cli.main(arguments) == 0
    assert "0 errors, 0 warnings, 0 pieces of advice" in capsys.readouterr().out
    store(input__zero=np.uint8(0))(model)
    onnx.save(model, tmp_path / "net.onnx")
    assert cli.main([*arguments, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["got"] == "UINT8"


def test_a_float_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    assert cli.main(["lint", "--for", "tensorrt", str(tmp_path / "net.onnx")]) == 2
    assert "QuantizeLinear" in capsys.readouterr().err


def test_rules_are_known_of_tensorrt_alone(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"of TensorRT alone.*got 'openvino'"):
        FakeQuantOnnxExporter(for_runtime="openvino").lint(tmp_path / "net.onnx")
