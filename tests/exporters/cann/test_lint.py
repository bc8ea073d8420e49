"""Lint of deploy models: valid files pass, and each broken rule is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import convert_qat_model
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.amct_goldens import CASES, GOLDENS
from tests.exporters.cann.qdq_graphs import Qdq, proto


def valid(folder: Path) -> onnx.ModelProto:
    """Conv on 20 channels, Gemm, and a join: a file without any finding."""
    generator = np.random.default_rng(0)
    net = Qdq([1, 20, 2, 2])
    x = net.fake("x", 0.0625, 5)
    weight = net.weight(generator.integers(-9, 9, (20, 20, 1, 1)), np.full(20, 0.125))
    bias = net.constant(np.ones(20), np.float32)
    y = net.node("Conv", x, weight, bias, name="conv")
    y = net.node("Flatten", net.node("Add", y, x, name="join"), name="flat")
    weight = net.weight(generator.integers(-9, 9, (3, 80)), 0.125)
    y = net.node(
        "Gemm",
        net.fake(y, 0.125),
        weight,
        net.constant(np.ones(3), np.float32),
        name="fc",
        transB=1,
    )
    onnx.save(proto(net.model(y)), folder / "qat.onnx")
    done = convert_qat_model(folder / "qat.onnx", folder / "net")
    return onnx.load(done.files["model"])


def findings(model: onnx.ModelProto, folder: Path) -> list[tuple[str, str, str, str]]:
    onnx.save(model, folder / "broken.onnx")
    found = CannExporter().lint(folder / "broken.onnx")
    return [(f.severity, f.node, f.must, f.got) for f in found]


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (n for n in model.graph.node if n.name == name)
    return found


def change(name: str, **attributes: Any) -> Callable[[onnx.ModelProto], None]:
    """Set attributes of a node; None removes one."""

    def apply(model: onnx.ModelProto) -> None:
        target = node(model, name)
        kept = [a for a in target.attribute if a.name not in attributes]
        new = [helper.make_attribute(k, v) for k, v in attributes.items() if v is not None]
        target.ClearField("attribute")
        target.attribute.extend([*kept, *new])

    return apply


def store(name: str, edit: Callable[[Any], Any]) -> Callable[[onnx.ModelProto], None]:
    """Replace an initializer's array."""

    def apply(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        array = np.asarray(edit(numpy_helper.to_array(tensor).copy()))
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return apply


def filled(value: Any) -> Callable[[Any], Any]:
    return lambda array: np.full_like(array, value)


def opset(version: int) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return apply


def domain(model: onnx.ModelProto) -> None:
    node(model, "conv.quant").domain = "ascend"
    second_opset(model)


def second_opset(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("ascend", 1))


def constant_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("fc.weight", TensorProto.INT8, [80, 3]))


def open_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def one_name(model: onnx.ModelProto) -> None:
    node(model, "fc").name = "conv"


def no_name(model: onnx.ModelProto) -> None:
    node(model, "flat").name = ""


def left_over(model: onnx.ModelProto) -> None:
    flat = node(model, "flat")
    flat.op_type = "QuantizeLinear"
    flat.input.append(model.graph.initializer[0].name)
    del flat.attribute[:]


def training_operator(model: onnx.ModelProto) -> None:
    node(model, "flat").op_type = "FakeQuantize"


def no_quant(model: onnx.ModelProto) -> None:
    node(model, "conv").input[0] = "x"


def real_reader(model: onnx.ModelProto) -> None:
    node(model, "join").input[1] = "conv.quant.output0"


def early_reader(model: onnx.ModelProto) -> None:
    join = node(model, "join")
    join.input[0] = node(model, "conv").output[0]


def dequant_of_real(model: onnx.ModelProto) -> None:
    node(model, "conv.dequant").input[0] = "x"


def antiquant_of_real(model: onnx.ModelProto) -> None:
    node(model, "conv.anti_quant").input[0] = "x"


def computed_param(model: onnx.ModelProto) -> None:
    # An input has no values before the model runs.
    node(model, "conv.dequant").input[1] = model.graph.input[0].name


BROKEN: dict[str, tuple[Callable[[onnx.ModelProto], None], str, str, str, str]] = {
    "domain": (domain, "error", "conv.quant", "default domain", "'ascend'"),
    "two opsets": (second_opset, "error", "opset_import", "one opset", "('ascend', 1)"),
    "opset too new": (opset(23), "error", "opset_import", "opsets 8 to 22", "opset 23"),
    "opset for new CANN": (opset(17), "warning", "opset_import", "old CANN", "opset 17"),
    "constant input": (constant_input, "warning", "fc.weight", "real inputs only", "constant"),
    "open shape": (open_shape, "advice", "x", "every input's shape", "None"),
    "one name twice": (one_name, "error", "conv", "names must be unique", "2 nodes"),
    "no name": (no_name, "advice", "v5", "should have names", "Flatten"),
    "left over": (left_over, "error", "flat", "must be AscendQuant", "QuantizeLinear"),
    "of training": (training_operator, "error", "flat", "every operator must be", "FakeQuantize"),
    "no scale": (change("conv.quant", scale=None), "error", "conv.quant", "takes 0.0", "none"),
    "INT scale": (change("conv.quant", scale=16), "error", "conv.quant", "a FLOAT", "INT"),
    "scale 0": (change("conv.quant", scale=0.0), "error", "conv.quant", "positive normal", "0.0"),
    "scale NaN": (
        change("conv.quant", scale=float("nan")),
        "error",
        "conv.quant",
        "positive normal",
        "nan",
    ),
    "scale not reciprocal": (
        change("fc.quant", scale=0.005),
        "warning",
        "fc.quant",
        "the reciprocal",
        "0.005",
    ),
    "pair not reciprocal": (
        change("conv.quant", scale=0.0625),
        "error",
        "conv.anti_quant",
        "1/scale_d",
        "0.0625",
    ),
    "offsets differ": (
        change("conv.anti_quant", offset=-5.0),
        "error",
        "conv.anti_quant",
        "offset",
        "-5.0",
    ),
    "dst_type": (
        change("conv.quant", dst_type="UINT8"),
        "error",
        "conv.quant",
        "dst_type",
        "UINT8",
    ),
    "no dst_type": (change("conv.quant", dst_type=None), "error", "conv.quant", "dst_type", "none"),
    "SAME in three dimensions": (
        change("conv", kernel_shape=[3, 3, 3], auto_pad="SAME_UPPER"),
        *("error", "conv", "must have pads or auto_pad VALID", "SAME_UPPER"),
    ),
    "INT16": (change("fc.quant", dst_type="INT16"), "error", "fc.quant", "int8 and int4", "INT16"),
    "offset too large": (
        change("fc.quant", offset=200.0),
        "error",
        "fc.quant",
        "from -128 to 127",
        "200.0",
    ),
    "offset a fraction": (
        change("fc.quant", offset=0.5),
        "error",
        "fc.quant",
        "holds an integer",
        "0.5",
    ),
    "round_mode": (change("fc.quant", round_mode="Up"), "error", "fc.quant", "round_mode", "Up"),
    "sqrt_mode": (change("fc.quant", sqrt_mode=2), "error", "fc.quant", "sqrt_mode", "2"),
    "float16 scale": (
        change("fc.quant", scale=70000.0),
        "warning",
        "fc.quant",
        "normal float16",
        "70000",
    ),
    "real reader": (real_reader, "error", "join", "AscendAntiQuant", "Add reads"),
    "no quant": (no_quant, "error", "conv", "must read an AscendQuant", "'x'"),
    "accumulator read": (early_reader, "error", "conv", "AscendDequant alone", "Add"),
    "dequant of real": (dequant_of_real, "error", "conv.dequant", "the accumulator", "'x'"),
    "antiquant of real": (
        antiquant_of_real,
        *("error", "conv.anti_quant", "AscendQuant gives", "'x'"),
    ),
    "param computed": (computed_param, "error", "conv.dequant", "an initializer", "'x'"),
    "param type": (
        store("conv.dequant.param", lambda a: a.astype(np.int64)),
        *("error", "conv.dequant.param", "must be uint64", "INT64"),
    ),
    "param length": (
        store("conv.dequant.param", lambda a: a[:7]),
        *("error", "conv.dequant.param", "length 1 or 20", "[7]"),
    ),
    "param rank": (
        store("fc.dequant.param", lambda a: a.reshape(1, 1)),
        *("error", "fc.dequant.param", "1-D", "[1, 1]"),
    ),
    "param without axis": (
        store(
            "fc.dequant.param", lambda a: filled(np.float32(1e-6).view(np.uint32))(a).reshape(())
        ),
        *("error", "fc.dequant.param", "1-D", "shape []"),
    ),
    "param high half": (
        store("fc.dequant.param", lambda a: a + np.uint64(2**40)),
        *("error", "fc.dequant.param", "high 32 bits", "0x100"),
    ),
    "param zero": (
        store("fc.dequant.param", filled(0)),
        *("error", "fc.dequant.param", "positive normal", "0.0"),
    ),
    "param float16": (
        store("fc.dequant.param", filled(np.float32(1e-6).view(np.uint32))),
        *("advice", "fc.dequant.param", "normal float16", "1e-06"),
    ),
    "dtype": (change("fc.dequant", dtype=27), "error", "fc.dequant", "dtype must be 0 or 1", "27"),
    "transB": (change("fc", transB=1), "error", "fc", "transA = transB = 0", "transB = 1"),
    "weight type": (
        store("fc.weight", lambda a: a.astype(np.float32)),
        *("error", "fc", "int8 initializer", "FLOAT"),
    ),
    "bias type": (
        store("fc.bias", lambda a: a.astype(np.float32)),
        *("error", "fc", "int32 initializer", "FLOAT"),
    ),
    "bias length": (store("fc.bias", lambda a: a[:2]), "error", "fc", "(3)", "[2]"),
    "folded bias": (
        store("conv.bias", filled(-(2**31) + 1)),
        *("error", "conv", "folded the offset in", "in channel"),
    ),
    "accumulator": (
        store("fc.bias", filled(2**31 - 1)),
        *("error", "fc", "below 2**31", "in channel"),
    ),
    "inexact simulation": (
        store("fc.bias", filled(2**24)),
        *("advice", "fc", "below 2**24", "in channel"),
    ),
    "weight without axes": (
        store("conv.weight", lambda a: a[0, 0, 0, 0]),
        *("error", "conv", "each dimension of the kernel", "shape []"),
    ),
    "kernel without dimensions": (
        store("conv.weight", lambda a: a[:, :, 0, 0]),
        *("error", "conv", "each dimension of the kernel", "shape [20, 20]"),
    ),
    "empty kernel": (
        store("conv.weight", lambda a: a[:, :, :0]),
        *("error", "conv", "none of them empty", "[20, 20, 0, 1]"),
    ),
    "groups of unequal size": (
        change("conv", group=3),
        *("error", "conv", "for each of 3 groups", "[20, 20, 1, 1]"),
    ),
    "no group": (change("conv", group=0), "error", "conv", "for each of 0 groups", "[20, 20"),
    "a stack of matrices": (
        store("fc.weight", lambda a: a[None]),
        *("error", "fc", "two axes", "[1, 80, 3]"),
    ),
    "a row of weights": (
        store("fc.weight", lambda a: a[:, 0]),
        *("error", "fc", "two axes", "shape [80]"),
    ),
    "channels": (
        store("conv.weight", lambda a: a[:, :7]),
        *("error", "conv", "the 20 channels", "a weight for 7"),
    ),
    "INT4": (
        store("conv.weight", lambda a: a[:, :10]),
        *("warning", "conv", "wts_type", "10 of 20"),
    ),
}


def test_a_valid_file_has_no_finding(tmp_path: Path) -> None:
    assert findings(valid(tmp_path), tmp_path) == []


@pytest.mark.parametrize("rule", BROKEN)
def test_each_broken_rule_is_named(rule: str, tmp_path: Path) -> None:
    change_it, severity, name, must, got = BROKEN[rule]
    model = valid(tmp_path)
    change_it(model)
    found = findings(model, tmp_path)
    assert any((f[0], f[1]) == (severity, name) and must in f[2] and got in f[3] for f in found), (
        found
    )


def test_packed_weights_need_an_even_number_of_channels(tmp_path: Path) -> None:
    model = valid(tmp_path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 19
    store("conv.weight", lambda a: a[:, :10])(model)
    assert any(
        f[:2] == ("error", "conv") and "even number" in f[2] for f in findings(model, tmp_path)
    )


def test_few_input_channels_are_advised_against(tmp_path: Path) -> None:
    net = Qdq([1, 3, 4, 4])
    y = net.node("Conv", net.fake("x", 0.5), net.weight(np.ones((2, 3, 3, 3)), 0.5), name="stem")
    onnx.save(proto(net.model(y)), tmp_path / "qat.onnx")
    done = convert_qat_model(tmp_path / "qat.onnx", tmp_path / "net")
    (finding,) = CannExporter().lint(done.files["model"])
    assert (finding.severity, finding.node, finding.got) == ("advice", "stem", "3 input channels")


def test_matrices_with_a_scale_per_channel_are_one_piece_of_advice(tmp_path: Path) -> None:
    net = Qdq([1, 2])
    y = net.node(
        "MatMul", net.fake("x", 0.5), net.weight(np.ones((2, 3)), [0.5, 1, 2], 1), name="a"
    )
    y = net.node("MatMul", net.fake(y, 0.5), net.weight(np.ones((3, 2)), [0.5, 1], 1), name="b")
    onnx.save(proto(net.model(y)), tmp_path / "qat.onnx")
    done = convert_qat_model(tmp_path / "qat.onnx", tmp_path / "net")
    (finding,) = CannExporter().lint(done.files["model"])
    assert (finding.severity, finding.node) == ("advice", "a")
    assert finding.got == "one scale per channel in 2 layers"
    assert "'granularity': 'per_tensor'" in finding.remedy


@pytest.mark.parametrize("name", CASES)
def test_amcts_own_files_have_no_errors_but_its_16_bits(name: str) -> None:
    found = CannExporter().lint(GOLDENS / name / "m_deploy_model.onnx")
    errors = [f for f in found if f.severity == "error"]
    # AMCT writes INT16, for which CANN's sources register no AscendQuant.
    assert [str(f) for f in errors if "INT16" not in f.got] == []
    assert bool(errors) == (name == "conv_a16w8")
