"""Operators at older opsets keep their meaning or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lightning_qat import convert_qat_model
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.qdq_graphs import (
    Qdq,
    deploy_of,
    f32,
    fake_quant_of,
    gemm_net,
    matched,
    proto,
    run_float,
)

# ----------------------------------------------------------------------------------------------
# Opset


def float_net(opset: int = 18) -> tuple[Qdq, str]:
    """Every operator with another spelling at opset 11."""
    net = Qdq([2, 4, 3, 6], opset)
    axes = net.constant([2, 3], np.int64)
    y = net.node("Add", "x", net.node("ReduceMean", "x", axes, noop_with_empty_axes=1))
    y = net.node("Mul", y, net.node("ReduceSum", y, net.constant([1], np.int64), keepdims=1))
    y = net.node("Squeeze", net.node("Unsqueeze", y, net.constant([0], np.int64)))
    y = net.node("Softmax", y, axis=1)
    y = net.node("Softmax", y, axis=-1)
    scale, bias = np.linspace(1, 2, 6, dtype=np.float32), np.ones(6, np.float32)
    y = net.node(
        "LayerNormalization", y, net.constant(scale), net.constant(bias), name="norm", axis=3
    )
    y = net.node("HardSwish", y)
    net.nodes.append(helper.make_node("Split", [y], ["two", "one"], axis=2, num_outputs=2))
    y = net.node("Sub", "two", "one")
    y = net.node("Resize", y, "", net.constant(f32([1, 1, 2, 1])), mode="nearest")
    pads, three = net.constant([1, 2], np.int64), net.constant([3], np.int64)
    y = net.node("Pad", y, pads, net.constant(0.5, np.float32), three)
    batch = net.node("Shape", y, start=0, end=1)
    rest = net.constant([-1], np.int64)
    y = net.node("Reshape", y, net.node("Concat", batch, rest, axis=0), allowzero=1)
    above = net.node("GreaterOrEqual", y, net.constant(0.5, np.float32))
    return net, net.node("Where", above, y, net.constant(0.25, np.float32))


@pytest.mark.parametrize("opset", [11, 12, 13, 15, 17, 18])
def test_remaining_operators_keep_their_meaning_at_older_opsets(opset: int) -> None:
    net, y = float_net()
    qdq = net.model(y)
    older = fake_quant_of(qdq, opset)
    assert older.graph.opset_imports == {"": opset}
    onnx.checker.check_model(proto(older), full_check=True)
    x = np.random.default_rng(0).normal(size=net.shape).astype(np.float32)
    (expected,), (actual,) = run_float(qdq, x), run_float(older, x)
    # LayerNormalization is one kernel there and nine operators here, over a small deviation.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_spelt_out(approximate: str) -> None:
    net = Qdq([50], opset=20)
    qdq = net.model(net.node("Gelu", "x", approximate=approximate))
    x = np.linspace(-4, 4, 50, dtype=np.float32)
    (expected,), (actual,) = run_float(qdq, x), run_float(fake_quant_of(qdq), x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


def test_what_an_opset_cannot_express_names_the_node_and_the_lowest_opset_that_can() -> None:
    net = Qdq([4, 4])
    lower = net.node("Trilu", "x", name="mask", upper=0)
    integer = net.node("Cast", lower, to=TensorProto.INT64)
    clipped = net.node("Clip", integer, net.constant(0, np.int64), name="limit")
    float_again = net.node("Cast", clipped, to=TensorProto.FLOAT)
    size = net.node("Shape", "x", start=0, end=1)
    computed = net.node("ReduceMax", float_again, size, name="reach")
    qdq = net.model(computed)
    with pytest.raises(UnsupportedByTarget) as caught:
        fake_quant_of(qdq, 11)
    problems = {p.layer: p for p in caught.value.problems}
    assert list(problems) == ["mask", "limit", "reach"]
    assert str(problems["mask"]) == (
        "'mask': Trilu does not exist yet; opset 11 cannot express it, the lowest opset that can "
        "is 14. Ask for opset 14, or use another operator."
    )
    assert "does not take INT64" in problems["limit"].reason
    assert problems["limit"].reason.endswith("is 12")
    assert "takes 'axes' as a computed input" in problems["reach"].reason
    assert problems["reach"].reason.endswith("is 18")
    assert fake_quant_of(qdq, 18).graph.opset_imports == {"": 18}


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs", "axis"),
    [
        ("Split", {"num_outputs": 1, "axis": 2}, (), 2),
        ("Softmax", {"axis": 3}, (), 3),
        ("LayerNormalization", {"axis": -4}, ([1.0],), -4),
        ("Pad", {}, (np.array([1, 1]), None, np.array([5])), 5),
    ],
)
def test_an_axis_that_a_declared_shape_has_not_names_the_node(
    operator: str, attributes: dict[str, int], inputs: tuple[Any, ...], axis: int
) -> None:
    """ONNX's checker does not see it where the shape is declared of a tensor between nodes."""
    net = Qdq([2, 2], 20)
    constants = [
        "" if value is None else net.constant(value, None if operator == "Pad" else np.float32)
        for value in inputs
    ]
    y = net.node(operator, "x", *constants, name="lost", **attributes)
    with pytest.raises(
        UnsupportedByTarget, match=rf"lost: {operator} works along axis {axis} of a tensor of 2"
    ):
        fake_quant_of(net.model(y), 11)


def test_a_kernel_of_more_dimensions_than_a_declared_shape_keeps_its_padding() -> None:
    net = Qdq([2, 2])
    weight = net.constant(np.ones((2, 2, 2, 2, 2)), np.float32)
    net.node("Conv", "x", weight, name="conv", auto_pad="SAME_UPPER", strides=[2, 2, 2])
    (conv,) = matched(net.model("v0")).model.graph
    assert conv.attributes.get_string("auto_pad", "") == "SAME_UPPER"


def test_the_lowest_opset_that_expresses_the_model_is_taken_and_said(tmp_path: Path) -> None:
    net = gemm_net()
    masked = net.node("Trilu", "x", name="block.mask/Trilu", upper=0)
    source = tmp_path / "net.onnx"
    onnx.save(proto(net.model("v3", masked)), source)
    done = convert_qat_model(source, tmp_path / "net")
    assert {
        role: onnx.load(done.files[role]).opset_import[0].version
        for role in ("model", "fake_quant")
    } == {"model": 14, "fake_quant": 14}
    assert done.notes == (
        "the deploy model is at opset 14, the lowest that expresses 'block.mask/Trilu' (Trilu does "
        "not exist yet at opset 13); CANN parses it from version 8.0 on",
    )
    with pytest.raises(UnsupportedByTarget, match=r"block\.mask/Trilu: .*Ask for opset 14"):
        convert_qat_model(source, tmp_path / "net", target=CannExporter(opset=11))


def test_integer_operators_of_newer_opsets_are_rewritten() -> None:
    net = Qdq([4], opset=18)
    whole = net.node("Cast", "x", to=TensorProto.INT64)
    two, minus = net.constant([2], np.int64), net.constant([-1, 0, 1, 3], np.int64)
    most = net.node("Max", whole, two, minus)
    least = net.node("Min", whole, two)
    never = net.node("CastLike", net.node("IsNaN", whole), "x")
    real = [net.node("CastLike", value, "x") for value in (most, least)]
    older = fake_quant_of(net.model(*real, never))
    assert older.graph.opset_imports == {"": 11}
    onnx.checker.check_model(proto(older), full_check=True)
    largest, smallest, nan = run_float(older, f32([-5, 1, 2, 9]))
    np.testing.assert_array_equal(largest, [2, 2, 2, 9])
    np.testing.assert_array_equal(smallest, [-5, 1, 2, 2])
    np.testing.assert_array_equal(nan, [0, 0, 0, 0])


def test_an_error_names_the_module_that_torch_s_exporter_noted() -> None:
    net = Qdq([4, 4])
    qdq = net.model(net.node("Trilu", "x", name="n2_3", upper=0))
    (node,) = (n for n in qdq.graph if n.op_type == "Trilu")
    scopes = "['', 'encoder', 'encoder.layers.0', 'tril']"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    with pytest.raises(
        UnsupportedByTarget, match=r"encoder\.layers\.0/Trilu \(n2_3\): Trilu does not exist yet"
    ):
        deploy_of(qdq, 11)


def test_an_opset_that_the_parser_does_not_take_is_no_remedy() -> None:
    net = Qdq([4], opset=20)
    qdq = net.model(net.node("Cast", net.node("IsInf", "x"), to=TensorProto.FLOAT))
    assert deploy_of(qdq).graph.opset_imports == {"": 11}
    net = Qdq([1, 1, 4, 4], opset=20)
    y = net.node("AveragePool", "x", name="thin", kernel_shape=[2, 2], dilations=[2, 2])
    with pytest.raises(
        UnsupportedByTarget, match=r"lowest opset that can is 19\. Use another operator"
    ):
        deploy_of(net.model(y))


def test_a_default_that_changed_is_not_taken_for_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = Qdq([2, 3, 4])
    qdq = net.model(net.node("Softmax", "x", name="soft"))
    monkeypatch.setattr("lightning_qat_exporters.cann.downgrade_opset.ADAPTERS", ())
    with pytest.raises(UnsupportedByTarget, match="soft: Softmax has another default for 'axis'"):
        deploy_of(qdq)


def test_grid_samples_get_their_older_modes() -> None:
    net = Qdq([1, 1, 3, 3], opset=20)
    grid = net.constant(np.random.default_rng(0).uniform(-1, 1, (1, 4, 4, 2)), np.float32)
    ys = [net.node("GridSample", "x", grid), net.node("GridSample", "x", grid, mode="cubic")]
    qdq = net.model(*ys)
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    older = fake_quant_of(qdq, 16)
    for expected, actual in zip(run_float(qdq, x), run_float(older, x), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_new_attribute_away_from_its_default_is_refused() -> None:
    net = Qdq([1, 1, 4, 4])
    sizes = net.constant([1, 1, 2, 2], np.int64)
    y = net.node("Resize", "x", "", "", sizes, name="shrink", mode="linear", antialias=1)
    with pytest.raises(
        UnsupportedByTarget, match=r"shrink: Resize has no attribute 'antialias' yet"
    ):
        deploy_of(net.model(y))


def test_an_opset_outside_what_the_parser_takes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"opset must be from 11 to 18, .* got 19\. Leave it"):
        deploy_of(gemm_net().model("v3"), 19)


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (13, 7), (18, 8)])
def test_the_ir_version_goes_with_the_opset(opset: int, ir_version: int) -> None:
    assert deploy_of(gemm_net().model("v3"), opset).ir_version == ir_version
