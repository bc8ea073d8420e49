"""Lint by CANN's ONNX plugins: a file of one node that keeps a rule, and one that breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.export.lint import Finding
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann.lint.plugins.registered import REGISTERED

X = np.zeros((1, 4, 8, 8), np.float32)
X3, X5 = X[..., 0], X[..., None]
KERNEL = np.zeros((4, 4, 3, 3), np.float32)
CUBE = np.zeros((4, 4, 3, 3, 3), np.float32)


class Case(NamedTuple):
    """A node on ``x``; its further inputs are constants."""

    operator: str
    x: Any
    constants: Sequence[Any]
    opset: int
    outputs: int
    attributes: Mapping[str, Any]

    def but(self, **attributes: Any) -> Case:
        return self._replace(attributes={**self.attributes, **attributes})


def case(operator: str, *constants: Any, x: Any = X, opset: int = 11, **attributes: Any) -> Case:
    return Case(operator, x, constants, opset, 1, attributes)


def lint(case: Case, folder: Path, **options: Any) -> list[Finding]:
    """The findings on a file of that node alone, advice on its container left out."""
    names = ["x", *(f"c{i}" if c is not None else "" for i, c in enumerate(case.constants))]
    outputs = ["y", *(f"y{i}" for i in range(1, case.outputs))]
    node = helper.make_node(case.operator, names, outputs, name="node", **case.attributes)
    made = [np.asarray(c) for c in case.constants if c is not None]
    kept = [name for name in names[1:] if name]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, np.shape(case.x))],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for array, name in zip(made, kept, strict=True)],
    )
    opsets = [helper.make_opsetid("", case.opset)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), folder / "f.onnx")
    found = CannExporter(**options).lint(folder / "f.onnx")
    return [f for f in found if f.node == "node"]


CONV = case("Conv", KERNEL, kernel_shape=[3, 3])
CONV3 = case("Conv", CUBE, x=X5, kernel_shape=[3, 3, 3])
UP = case("ConvTranspose", KERNEL, kernel_shape=[3, 3])
UP3 = case("ConvTranspose", CUBE, x=X5, kernel_shape=[3, 3, 3])
MAX, MEAN = (case(f"{kind}Pool", kernel_shape=[2, 2]) for kind in ("Max", "Average"))
MAX3, MEAN3 = (m._replace(x=X5).but(kernel_shape=[2, 2, 2]) for m in (MAX, MEAN))
NO_ROI, SIZES = np.zeros(0, np.float32), np.array([1, 4, 16, 16])
NEAREST = case(
    *("Resize", NO_ROI, NO_ROI, SIZES),
    coordinate_transformation_mode="asymmetric",
    nearest_mode="floor",
)
LINEAR = NEAREST.but(mode="linear")
LSTM = case(*("LSTM", np.zeros((1, 8, 8), "f4"), np.zeros((1, 8, 2), "f4")), x=X[0], hidden_size=2)
GRU = case("GRU", np.zeros((1, 6, 8), "f4"), np.zeros((1, 6, 2), "f4"), x=X[0], hidden_size=2)
SCATTER = case("ScatterND", np.zeros((1, 4), np.int64), np.zeros(1, np.float32), opset=16)
NORM = case("BatchNormalization", *[np.ones(4, np.float32)] * 4)
FILL = helper.make_tensor("v", TensorProto.BOOL, [1], [True])
PRELU = case("PRelu", np.ones((4, 1, 1), np.float32))
SPLIT = case("Split", opset=18, axis=1, num_outputs=2)._replace(outputs=2)

RULES: dict[str, tuple[Case, Case, str, str, str]] = {
    # kept, broken, severity, must, got
    "conv without dimensions": (CONV, case("Conv", KERNEL), "error", "kernel_shape", "none of"),
    "odd pads": (CONV, CONV.but(pads=[1, 1, 1]), "error", "even length", "3 pads"),
    "odd pads of a pool": (MAX, MAX.but(pads=[1, 1, 1]), "error", "even length", "3 pads"),
    "float conv, SAME in three dimensions": (
        CONV3.but(auto_pad="VALID"),
        case("Conv", CUBE, x=X5, strides=[1, 1, 1], auto_pad="SAME_UPPER"),  # no kernel_shape
        *("error", "pads or auto_pad VALID", "SAME_UPPER"),
    ),
    "no kernel of a transposed": (
        *(UP, case("ConvTranspose", KERNEL)),
        *("error", "must have kernel_shape", "no kernel_shape"),
    ),
    "output_shape": (
        *(UP.but(output_padding=[0, 0]), UP.but(output_shape=[9, 9])),
        *("error", "output_shape must be left out", "[9, 9]"),
    ),
    "dilated transposed cube": (
        *(UP3.but(dilations=[1, 1, 1]), UP3.but(dilations=[1, 2, 1])),
        *("error", "graph mode", "dilations [1, 2, 1]"),
    ),
    "output_padding of a cube": (
        *(UP.but(output_padding=[1, 1]), UP3.but(strides=[2, 2, 2], output_padding=[0, 0, 1])),
        *("error", "graph mode", "output_padding"),
    ),
    "a large stride": (
        *(CONV.but(strides=[63, 63]), CONV.but(strides=[1, 64], pads=[0, 0, 0, 256])),
        *("warning", "in the operator's ranges", "strides 64 (up to 63), pads 256 (up to 255)"),
    ),
    "a large kernel": (
        case("Conv", np.zeros((4, 4, 1, 511), "f4"), x=np.zeros((1, 4, 8, 600)), strides=[1, 1]),
        case("Conv", np.zeros((4, 4, 1, 512), "f4"), x=np.zeros((1, 4, 8, 600)), strides=[1, 1]),
        *("warning", "in the operator's ranges", "kernel 512 (up to 511)"),
    ),
    "a transposed kernel": (
        case("ConvTranspose", np.zeros((4, 4, 255), "f4"), x=X3, kernel_shape=[255]),
        case("ConvTranspose", np.zeros((4, 4, 256), "f4"), x=X3, kernel_shape=[256]),
        *("warning", "in the operator's ranges", "kernel 256 (up to 255)"),
    ),
    "no limit on depth": (
        CONV3.but(strides=[99, 1, 1], pads=[300, 0, 0, 300, 0, 0]),
        CONV3.but(strides=[1, 99, 1]),
        *("warning", "in the operator's ranges", "strides 99"),
    ),
    "a wide input": (
        case("Conv", KERNEL[..., 0], x=np.zeros((1, 4, 4096)), kernel_shape=[3]),
        case("Conv", KERNEL[..., 0], x=np.zeros((1, 4, 16000)), kernel_shape=[3]),
        *("warning", "4096 or less", "16000"),
    ),
    "alpha without C": (
        case("Gemm", KERNEL[0, 0], np.zeros(3, "f4"), x=np.zeros((2, 3)), alpha=0.5),
        case("Gemm", KERNEL[0, 0], x=np.zeros((2, 3)), alpha=0.5),
        *("error", "must have alpha 1", "alpha 0.5"),
    ),
    "a vector": (
        case("MatMul", KERNEL[0, 0], x=np.zeros((1, 3))),
        case("MatMul", KERNEL[0, 0], x=np.zeros(3)),
        *("error", "2 to 6 dimensions", "1 dimensions"),
    ),
    "attributes of an LSTM": (
        *(LSTM.but(activations=["Sigmoid", "Tanh", "Tanh"]), LSTM.but(clip=1.0)),
        *("error", "reads no other attribute", "clip"),
    ),
    "activations of an LSTM": (
        *(LSTM, LSTM.but(activations=["Sigmoid", "Relu", "Tanh"])),
        *("error", "reads no other attribute", "activations"),
    ),
    "torch's GRU": (
        *(GRU.but(linear_before_reset=0), GRU.but(linear_before_reset=1)),
        *("error", "reads no other attribute", "linear_before_reset 1"),
    ),
    "a window of 4": (
        *(MAX3, MAX.but(kernel_shape=[2, 2, 2, 2])),
        *("error", "one, two or three", "[2, 2, 2, 2]"),
    ),
    "indices": (MAX, MAX._replace(outputs=2), "error", "one output", "two outputs"),
    "storage order": (MAX, MAX.but(storage_order=1), "error", "storage_order", "storage_order 1"),
    "dilated MaxPool": (
        *(MAX3.but(dilations=[2, 1, 1]), MAX.but(dilations=[2, 1])),
        *("error", "leaves them out", "dilations [2, 1]"),
    ),
    "SAME_LOWER": (
        *(MAX.but(auto_pad="SAME_UPPER"), MAX.but(auto_pad="SAME_LOWER")),
        *("error", "written as numbers", "SAME_LOWER"),
    ),
    "SAME of AvgPool3D": (
        *(MAX3.but(auto_pad="SAME_UPPER"), MEAN3.but(auto_pad="SAME_UPPER")),
        *("error", "written as numbers", "SAME_UPPER"),
    ),
    "a large window, rounded up": (
        MAX.but(kernel_shape=[16, 16], ceil_mode=0),
        MAX.but(kernel_shape=[16, 16], ceil_mode=1, auto_pad="SAME_UPPER"),
        *("error", "padding VALID", "ceil_mode 1, auto_pad SAME_UPPER"),
    ),
    "a large mean": (
        *(MEAN.but(kernel_shape=[15, 17]), MEAN.but(kernel_shape=[16, 16])),
        *("warning", "255 values or fewer", "[16, 16]"),
    ),
    "a large stride of a mean": (
        *(MEAN.but(strides=[63, 1]), MEAN.but(strides=[64, 1])),
        *("warning", "strides up to 63", "[64, 1]"),
    ),
    "GlobalMaxPool of a cube": (
        *(case("GlobalMaxPool"), case("GlobalMaxPool", x=X5)),
        *("error", "must read 4 dimensions", "5 dimensions"),
    ),
    "LpPool": (
        case("LpPool", opset=18, kernel_shape=[2, 2], dilations=[1, 1]),
        case("LpPool", opset=18, kernel_shape=[2, 2], ceil_mode=1),
        *("error", "ceil_mode 0 and dilations 1", "ceil_mode 1"),
    ),
    "two inputs of Resize": (
        case("Resize", np.ones(4, "f4"), opset=10),
        case("Resize", np.zeros(0, "f4"), opset=13),
        *("error", "three inputs or more", "2 inputs"),
    ),
    "antialias": (
        LINEAR._replace(opset=18).but(antialias=0, keep_aspect_ratio_policy="stretch"),
        LINEAR._replace(opset=18).but(antialias=1),
        *("error", "alone", "antialias 1"),
    ),
    "axes of Resize": (
        *(NEAREST._replace(opset=18), NEAREST._replace(opset=18).but(axes=[2, 3])),
        *("error", "alone", "axes"),
    ),
    "Resize of a row": (
        *(LINEAR, LINEAR._replace(x=X3)),
        *("error", "must read 4 dimensions", "3 dimensions"),
    ),
    "Resize of a cube": (
        *(NEAREST, NEAREST._replace(x=X5)),
        *("error", "must read 4 dimensions", "5 dimensions"),
    ),
    "nearest, rounded otherwise": (
        NEAREST.but(coordinate_transformation_mode="half_pixel", nearest_mode="round_prefer_ceil"),
        case("Resize", NO_ROI, NO_ROI, SIZES),  # ONNX's defaults
        *("warning", "does not read nearest_mode", "half_pixel with round_prefer_floor"),
    ),
    "cubic": (LINEAR, NEAREST.but(mode="cubic"), "warning", "nearest or linear", "mode cubic"),
    "axes of Pad": (
        case("Pad", np.zeros(8, np.int64), np.float32(0), opset=18),
        case("Pad", np.zeros(2, np.int64), None, np.array([3]), opset=18),
        *("error", "no input for axes", "a fourth input"),
    ),
    "unequal parts": (
        *(SPLIT, SPLIT.but(num_outputs=3)),
        *("error", "equal parts", "4 in 3 parts"),
    ),
    "parts along no axis": (
        *(SPLIT, SPLIT.but(axis=32768)),
        *("error", "axis from 0", "axis 32768 of 4"),
    ),
    "no parts": (SPLIT, SPLIT.but(num_outputs=0), "error", "equal parts", "0 parts"),
    "parts from behind": (
        SPLIT._replace(constants=[np.array([2, 2])]).but(axis=-1),
        SPLIT.but(axis=-1),
        *("error", "axis from 0", "axis -1"),
    ),
    "Transpose of all": (
        *(case("Transpose", perm=[0, 3, 2, 1]), case("Transpose")),
        *("error", "must have perm", "no perm"),
    ),
    "DepthToSpace": (
        *(case("DepthToSpace", blocksize=2), case("DepthToSpace", blocksize=1)),
        *("error", "2 or more", "blocksize 1"),
    ),
    "part of a Shape": (
        *(case("Shape", opset=15), case("Shape", opset=15, start=1)),
        *("error", "neither start nor end", "start 1"),
    ),
    "ScatterND that adds": (
        *(SCATTER.but(reduction="none"), SCATTER.but(reduction="add")),
        *("error", "reads no reduction", "reduction add"),
    ),
    "GridSample": (
        case("GridSample", X, opset=16, mode="bilinear", padding_mode="zeros"),
        case("GridSample", X, opset=16, mode="bilinear"),
        *("error", "must be written", "no padding_mode"),
    ),
    "Clip": (
        *(case("Clip", np.float32(0)), case("Clip")),
        *("error", "must have min or max", "neither"),
    ),
    "Clip by attributes": (
        *(case("Clip", opset=10, min=0.0), case("Clip", None, None)),
        *("error", "must have min or max", "neither"),
    ),
    "Softmax": (
        *(case("Softmax", axis=3), case("Softmax", axis=1)),
        *("warning", "the last axis", "axis 1 of 4"),
    ),
    "Softmax of opset 13": (
        *(case("Softmax", opset=13, axis=1), case("Softmax")),
        *("warning", "the last axis", "axis 1 of 4"),
    ),
    "LogSoftmax": (
        *(case("LogSoftmax", axis=-1), case("LogSoftmax")),
        *("error", "that of the plugin -1", "no axis"),
    ),
    "LogSoftmax elsewhere": (
        case("LogSoftmax", x=np.zeros((2, 5, 1)), axis=1),  # nothing behind it
        case("LogSoftmax", axis=-2),
        *("error", "the last", "axis -2 of 4"),
    ),
    "Selu": (
        *(case("Selu", alpha=1.6732632), case("Selu", gamma=1.0)),
        *("error", "ONNX's defaults", "gamma 1"),
    ),
    "ArgMax": (
        case("ArgMax", opset=13, select_last_index=0),
        case("ArgMax", opset=13, select_last_index=1),
        *("error", "select_last_index", "select_last_index 1"),
    ),
    "LRN": (case("LRN", size=3), case("LRN", size=4), "error", "size must be odd", "size 4"),
    "batch norm of rows": (
        *(NORM._replace(x=X5), NORM._replace(x=X3)),
        *("warning", "4 or 5 dimensions", "3 dimensions"),
    ),
    "batch norm that trains": (
        *(NORM._replace(opset=15), NORM._replace(opset=15).but(training_mode=1)),
        *("error", "one of inference", "training_mode 1"),
    ),
    "ConstantOfShape": (
        case("ConstantOfShape", value=numpy_helper.from_array(np.array([True]))),
        case("ConstantOfShape", value=FILL),
        *("error", "raw_data", "BOOL outside raw_data"),
    ),
    "Cast": (
        case("Cast", opset=13, to=TensorProto.BFLOAT16),
        case("Cast", opset=18, to=TensorProto.FLOAT8E4M3FN),
        *("error", "up to bfloat16", "FLOAT8E4M3FN"),
    ),
    "PRelu": (
        *(PRELU, PRELU._replace(constants=[np.ones((4, 8, 1), np.float32)])),
        *("warning", "one for each channel", "[4, 8, 1]"),
    ),
    "Mod": (
        case("Mod", np.float32(2), opset=13, fmod=0),
        case("Mod", np.float32(2), opset=13, fmod=1),
        *("error", "does not read it", "fmod 1"),
    ),
    "not at this opset": (
        *(case("HardSwish", opset=14), case("ReduceL2", opset=18)),
        *("error", "no other", "opset 18; registered are 8 to 17"),
    ),
    "above them all": (
        *(case("Relu", opset=18), case("Relu", opset=19)),
        *("error", "only Ascend's own operators", "Relu at opset 19"),
    ),
    "in no source": (
        *(case("Identity", opset=18), case("DFT", opset=18)),
        *("warning", "open sources have none", "DFT"),
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_is_named_where_it_is_broken_and_nowhere_else(rule: str, tmp_path: Path) -> None:
    kept, broken, severity, must, got = RULES[rule]
    assert [f for f in lint(kept, tmp_path) if must in f.must] == []
    found = lint(broken, tmp_path)
    assert any(f.severity == severity and must in f.must and got in f.got for f in found), found


@pytest.mark.parametrize(
    ("kept", "broken", "severity", "got"),
    [
        (CONV, CONV3, "warning", "rank 5"),
        (CONV, case("Conv", KERNEL[..., 0], x=X3, kernel_shape=[3]), "advice", "one dimension"),
        (UP, UP3, "error", "rank 5"),
    ],
)
def test_integer_layers_are_judged_by_their_dimensions(
    kept: Case, broken: Case, severity: str, got: str, tmp_path: Path
) -> None:
    assert not any(got in f.got for f in lint(broken, tmp_path))  # float
    for case, expected in ((kept, []), (broken, [severity])):
        integer = case._replace(constants=[case.constants[0].astype(np.int8)])
        assert [f.severity for f in lint(integer, tmp_path) if got in f.got] == expected


def test_a_product_may_have_no_convolutions_of_int8(tmp_path: Path) -> None:
    integer = CONV._replace(constants=[KERNEL.astype(np.int8)])
    for product, expected in (("Ascend910B", []), ("Ascend950", ["1 integer convolutions"])):
        found = lint(integer, tmp_path, product=product)
        assert [f.got for f in found if "table of types for it" in f.must] == expected


def test_nodes_inside_a_branch_are_judged_too(tmp_path: Path) -> None:
    branches = [
        helper.make_graph(
            [helper.make_node("Transpose", ["x"], [f"y{i}"], name=f"branch{i}", perm=perm)],
            f"g{i}",
            [],
            [helper.make_empty_tensor_value_info(f"y{i}")],
        )
        for i, perm in enumerate(([1, 0], None))
    ]
    graph = helper.make_graph(
        [
            helper.make_node(
                *("If", ["c"], ["y"], "if"), then_branch=branches[0], else_branch=branches[1]
            )
        ],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, [1]),
        ],
        [helper.make_empty_tensor_value_info("y")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)])
    onnx.save(model, tmp_path / "f.onnx")
    errors = [f for f in CannExporter().lint(tmp_path / "f.onnx") if f.severity == "error"]
    assert [(f.node, f.got) for f in errors] == [("branch1", "no perm")]


def test_every_registered_operator_is_onnxs_and_every_rule_is_for_one() -> None:
    assert all(onnx.defs.has(name) for name in REGISTERED)
    assert {rule[1].operator for rule in RULES.values()} - {"DFT"} <= set(REGISTERED)
