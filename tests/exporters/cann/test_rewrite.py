"""From a QDQ graph to a deploy graph, by hand-worked cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from lightning_qat.amct.record import parse_record
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.onnx_files.write import save_onnx
from tests.exporters.cann.qdq_graphs import (
    Array,
    Qdq,
    deploy_of,
    f32,
    fake_quant_of,
    gemm_net,
    matched,
    proto,
    run_float,
)


def i32(values: Any) -> Array:
    return np.asarray(values, np.int32)


def nodes_of(model: ir.Model) -> list[tuple[str, str | None]]:
    return [(node.op_type, node.name) for node in model.graph]


def array_of(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return np.asarray(tensor.numpy())


def attributes_of(model: ir.Model, name: str) -> dict[str, Any]:
    (node,) = (node for node in model.graph if node.name == name)
    return {key: attribute.value for key, attribute in node.attributes.items()}


def run_deploy(model: ir.Model, x: Array) -> list[Array]:
    return AscendExecutor(model).run({"x": x})


def test_a_gemm_gets_a_transposed_weight_an_integer_bias_and_a_parameter_of_float_bits() -> None:
    model = deploy_of(gemm_net().model("v3"))
    assert nodes_of(model) == [
        ("AscendQuant", "fc.quant"),
        ("Gemm", "fc"),
        ("AscendDequant", "fc.dequant"),
    ]
    quant, gemm, dequant = model.graph
    assert attributes_of(model, "fc.quant") == {"scale": 4.0, "offset": -8.0, "dst_type": "INT8"}
    assert attributes_of(model, "fc") == {"alpha": 1.0, "beta": 1.0, "transB": 0}
    assert attributes_of(model, "fc.dequant") == {"dtype": 0}
    assert [v.name for v in gemm.inputs if v] == ["fc.quant.output0", "fc.weight", "fc.bias"]
    assert [v.name for v in dequant.inputs if v] == ["fc_output0", "fc.dequant.param"]
    assert [v.name for v in (*quant.outputs, *dequant.outputs)] == ["fc.quant.output0", "y"]
    assert array_of(model, "fc.weight").tolist() == [[1, 4], [2, 5], [3, 6]]
    # A step of the accumulator is 0.25 * 0.5: 1 / 0.125 = 8, and -1.5 goes to even.
    assert array_of(model, "fc.bias").tolist() == [8, -2]
    assert array_of(model, "fc.bias").dtype == np.int32
    # float32 0.125 is sign 0, exponent 124, mantissa 0.
    assert array_of(model, "fc.dequant.param").tolist() == [124 << 23]
    assert array_of(model, "fc.dequant.param").dtype == np.uint64
    assert set(model.graph.initializers) == {"fc.weight", "fc.bias", "fc.dequant.param"}
    # x = [1, 0, -1] is 4, 0, -4 steps: 4 - 12 + 8 = 0 and 16 - 24 - 2 = -10 steps of 0.125.
    (y,) = run_deploy(model, f32([[1, 0, -1]]))
    assert y.tolist() == [[0.0, -1.25]]


def test_the_given_model_stays_as_it_is() -> None:
    model = gemm_net().model("v3")
    before = proto(model).SerializeToString()
    deploy_of(model)
    fake_quant_of(model)
    assert proto(model).SerializeToString() == before


def test_tensors_are_stored_raw() -> None:
    stored = proto(deploy_of(gemm_net().model("v3"))).graph.initializer
    assert [bool(tensor.raw_data) for tensor in stored] == [True] * 3


def test_two_pairs_on_one_tensor_with_the_same_numbers_share_one_quant() -> None:
    net = Qdq([1, 2])
    r = net.node("Relu", "x", name="relu")
    ys = [
        net.node("MatMul", net.fake(r, scale, 3), net.weight([[1, 2], [3, 4]], 1.0), name=name)
        for name, scale in (("a", 0.5), ("b", 0.5), ("c", 0.25))
    ]
    model = deploy_of(net.model(*ys))
    assert nodes_of(model) == [
        ("Relu", "relu"),
        *(("AscendQuant", "a.quant"), ("MatMul", "a"), ("AscendDequant", "a.dequant")),
        *(("MatMul", "b"), ("AscendDequant", "b.dequant")),
        *(("AscendQuant", "c.quant"), ("MatMul", "c"), ("AscendDequant", "c.dequant")),
    ]


def test_a_real_reader_of_a_quantized_tensor_gets_antiquant_from_the_shared_quant() -> None:
    net = Qdq([1, 2])
    data = net.fake("x", 0.5, 3)
    y = net.node("MatMul", data, net.weight([[1, 2], [3, 4]], 1.0), name="fc")
    qdq = net.model(net.node("Add", y, data, name="join"))
    model = deploy_of(qdq)
    assert nodes_of(model) == [
        ("AscendQuant", "fc.quant"),
        ("AscendAntiQuant", "fc.anti_quant"),
        ("MatMul", "fc"),
        ("AscendDequant", "fc.dequant"),
        ("Add", "join"),
    ]
    # scale_d itself, not its reciprocal; the offset with its own sign.
    expected = {"scale": 0.5, "offset": 3.0, "dst_type": "INT8"}
    assert attributes_of(model, "fc.anti_quant") == expected
    # x = [0.6, 1.4] is 1 and 3 steps: [1 + 9, 2 + 12] * 0.5 + [0.5, 1.5]
    x = f32([[0.6, 1.4]])
    assert run_deploy(model, x)[0].tolist() == [[5.5, 8.5]]
    assert run_float(fake_quant_of(qdq), x)[0].tolist() == [[5.5, 8.5]]


def test_a_join_without_a_layer_is_named_after_its_reader() -> None:
    net = Qdq([1, 2])
    left, right = net.fake("x", 0.5), net.fake(net.node("Relu", "x", name="relu"), 0.25)
    model = deploy_of(net.model(net.node("Add", left, right, name="join")))
    assert sorted(nodes_of(model)) == [
        ("Add", "join"),
        ("AscendAntiQuant", "join.anti_quant"),
        ("AscendAntiQuant", "join_1.anti_quant"),
        ("AscendQuant", "join.quant"),
        ("AscendQuant", "join_1.quant"),
        ("Relu", "relu"),
    ]
    assert run_deploy(model, f32([[-0.6, 0.7]]))[0].tolist() == [[-0.5, 1.25]]


def test_integers_and_real_values_of_one_tensor_may_be_graph_outputs() -> None:
    net = Qdq([2])
    real = net.fake("x", 0.5, 3)
    qdq = net.model(net.nodes[0].output[0], real, net.node("Neg", real))
    model = deploy_of(qdq)
    assert [value.name for value in model.graph.outputs] == ["y", "y1", "y2"]
    assert [n.op_type for n in model.graph] == ["AscendQuant", "AscendAntiQuant", "Neg"]
    x = f32([0.6, 100.0])
    integers, values, negated = run_deploy(model, x)
    assert (integers.dtype, integers.tolist()) == (np.dtype(np.int8), [4, 127])
    assert values.tolist() == [0.5, 62.0]
    assert negated.tolist() == [-0.5, -62.0]
    for ours, float_form in zip(
        run_deploy(model, x), run_float(fake_quant_of(qdq), x), strict=True
    ):
        assert ours.dtype == float_form.dtype
        assert ours.tolist() == float_form.tolist()


def test_unsigned_grids_become_signed_ones() -> None:
    signed, unsigned = (
        deploy_of(gemm_net().model("v3")),
        deploy_of(_unsigned_gemm().model("v3")),
    )
    assert attributes_of(unsigned, "fc.quant") == attributes_of(signed, "fc.quant")


def _unsigned_gemm() -> Qdq:
    net = gemm_net()
    name = net.nodes[0].input[2]
    net.constants[name] = np.asarray(120, np.uint8)
    return net


def test_a_clip_that_narrows_the_grid_keeps_its_meaning() -> None:
    qdq = gemm_net(clip=(-10, -5)).model("v4")
    deploy, fake = deploy_of(qdq), fake_quant_of(qdq)
    assert nodes_of(deploy)[:2] == [("Clip", "fc.quant.clip"), ("AscendQuant", "fc.quant")]
    x = f32([[9.0, 0.3, -9.0]])
    # 3, 1 and -2 steps: 3 + 2 - 6 + 8 = 7 and 12 + 5 - 12 - 2 = 3
    assert run_deploy(deploy, x)[0].tolist() == [[0.875, 0.375]]
    assert run_float(fake, x)[0].tolist() == [[0.875, 0.375]]


def test_a_layer_called_twice_gets_names_of_its_own() -> None:
    net = Qdq([1, 2])
    y = "x"
    for _ in range(2):
        weight = net.weight([[1, 2], [3, 4]], 1.0)
        y = net.node("Gemm", net.fake(y, 0.5), weight, name="fc")
    model = deploy_of(net.model(y))
    assert [name for _, name in nodes_of(model)] == [
        *("fc.quant", "fc", "fc.dequant", "fc_1.quant", "fc_1", "fc_1.dequant"),
    ]
    assert {"fc.weight", "fc_1.weight"} <= set(model.graph.initializers)


@pytest.mark.parametrize("transposed_first", [False, True])
def test_third_party_weights_are_read(transposed_first: bool) -> None:
    """AMCT's intermediate form: float constant, Q and DQ along axis 1, then Transpose."""
    net = Qdq([1, 2, 4])
    data = net.fake("x", 0.5)
    real = f32([[[1.0]], [[-0.8]], [[9.9]]])  # [Cout 3, Cin 1, k 1], groups of one
    scale = net.constant([0.5, 0.25, 0.0625], np.float32)
    zero = net.constant([0, 0, 0], np.int8)
    if transposed_first:
        value = net.constant(real.transpose(1, 0, 2))
        factors: dict[str, Any] = {"axis": 1}
    else:
        value, factors = net.constant(real), {"axis": 0}
    value = net.node("QuantizeLinear", value, scale, zero, **factors)
    value = net.node("DequantizeLinear", value, scale, zero, **factors)
    if transposed_first:
        value = net.node("Transpose", value, perm=[1, 0, 2])
    single = net.node("Slice", data, *(net.constant([n], np.int64) for n in (0, 1, 1)))
    requantized = net.fake(single, 0.5)
    model = deploy_of(net.model(net.node("Conv", requantized, value, name="conv")))
    # 1 / 0.5 = 2, -0.8 / 0.25 = -3.2, 9.9 / 0.0625 = 158.4 saturates
    assert array_of(model, "conv.weight").tolist() == [[[2]], [[-3]], [[127]]]


def test_grouped_transposed_convolutions_repeat_their_scales() -> None:
    net = Qdq([1, 4, 3])
    weight = net.weight(np.ones((4, 2, 1)), [0.5, 0.25], 1)
    y = net.node("ConvTranspose", net.fake("x", 1.0), weight, name="d", group=2)
    model = deploy_of(net.model(y))
    steps = array_of(model, "d.dequant.param").astype(np.uint32).view(np.float32)
    assert steps.tolist() == [0.5, 0.25, 0.5, 0.25]


def test_a_bias_stored_as_scaled_integers_comes_back_exactly() -> None:
    net = Qdq([1, 1])
    integers = i32([2**31 - 1, -123456789])
    step = np.float32(0.1) * np.float32(0.3)
    bias = net.node("DequantizeLinear", net.constant(integers), net.constant(step))
    weight = net.weight([[1], [2]], 0.3)
    y = net.node("Gemm", net.fake("x", 0.1), weight, bias, name="fc", transB=1)
    model = deploy_of(net.model(y))
    assert array_of(model, "fc.bias").tolist() == integers.tolist()


def test_layers_without_integers_stay_float_and_say_why() -> None:
    net = Qdq([1, 2])
    y = net.node("MatMul", "x", net.weight([[1, 2], [3, 4]], 0.5), name="weight_only")
    y = net.node("MatMul", net.fake(y, 0.5), net.constant(f32(np.eye(2))), name="data_only")
    y = net.node("MatMul", y, net.constant(f32(np.eye(2))), name="plain")
    y = net.node(
        "Gemm", net.fake(y, 0.5), net.weight([[1, 2], [3, 4]], 0.5), name="scaled", alpha=2.0
    )
    y = net.node("MatMul", net.fake(y, 0.5), net.weight(np.ones((2, 2)), [1, 2]), name="by_row")
    qdq = net.model(y)
    found = matched(qdq)
    assert found.layers == ()
    assert [str(remark) for remark in found.left_float] == [
        "'weight_only': its weight is quantized and its input is not.",
        "'data_only': its input is quantized and its weight is no quantized constant.",
        "'plain': neither its input nor its weight is quantized.",
        "'scaled': a quantized Gemm must have transA = 0 and alpha = beta = 1.",
        "'by_row': its weight's scales must run along the output channels (axis 1); they run "
        "along axis 0. Quantize along the output channels, or per tensor.",
    ]
    model = deploy_of(qdq)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in model.graph}
    # x = [1, 1] -> [2, 3] -> itself -> itself -> 2 * [5.5, 8] -> [11, 16] @ [[1, 1], [2, 2]]
    assert run_deploy(model, f32([[1, 1]]))[0].tolist() == [[43.0, 43.0]]


def test_a_bias_outside_int32_is_refused_by_layer_and_channel() -> None:
    net = gemm_net()
    name = net.nodes[3].input[2]
    net.constants[name] = f32([1.0, 3e8])
    with pytest.raises(
        UnsupportedByTarget,
        match=r"fc: the bias of channel 1, .* must fit int32; got 2400000000 \(bias 3e\+08, step "
        r"0\.125\)\. Widen the range",
    ):
        deploy_of(net.model("v3"))


def test_weights_outside_int8_are_refused() -> None:
    net = Qdq([1, 1])
    factors = [net.constant([[200]], np.uint8), net.constant(1.0, np.float32)]
    y = net.node("MatMul", net.fake("x", 1.0), net.node("DequantizeLinear", *factors), name="fc")
    with pytest.raises(
        UnsupportedByTarget, match=r"fc: .* must fit int8; they run from 200 to 200"
    ):
        deploy_of(net.model(y))


def test_pairs_that_have_no_form_are_all_named() -> None:
    net = Qdq([1, 2])
    scales, zeros = net.constant([1, 2], np.float32), net.constant([0, 0], np.int8)
    per_channel = net.node("QuantizeLinear", "x", scales, zeros, name="per_channel")
    y = net.node("DequantizeLinear", per_channel, scales, zeros)
    one, two = net.constant(1, np.float32), net.constant(2, np.float32)
    zero = net.constant(0, np.int8)
    differing = net.node("QuantizeLinear", y, one, zero, name="differing")
    y = net.node("DequantizeLinear", differing, two, zero, name="dq")
    with pytest.raises(UnsupportedByTarget) as caught:
        deploy_of(net.model(y))
    assert [(p.layer, p.reason) for p in caught.value.problems] == [
        (
            "per_channel",
            "an activation must have one scale and one zero point; got 2 scales and 2 zero points "
            "(tensor 'x')",
        ),
        (
            "differing",
            "QuantizeLinear and DequantizeLinear of a pair must share scale and zero point; "
            "'dq' has others (tensor 'v1')",
        ),
    ]


def test_pairs_inside_a_subgraph_are_refused() -> None:
    branches = {}
    for branch in ("then_branch", "else_branch"):
        factors = ["scale", "zero"]
        nodes = [
            helper.make_node(
                "QuantizeLinear", ["x", *factors], [f"{branch}_q"], name=f"{branch}.q"
            ),
            helper.make_node("DequantizeLinear", [f"{branch}_q", *factors], [f"{branch}_y"]),
        ]
        result = helper.make_tensor_value_info(f"{branch}_y", TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph(nodes, branch, [], [result])
    net = Qdq([2])
    net.constants |= {"scale": np.asarray(0.5, np.float32), "zero": np.asarray(0, np.int8)}
    qdq = net.model(net.node("If", net.constant(True), **branches))
    with pytest.raises(UnsupportedByTarget, match=r"then_branch.q: a Q/DQ pair must not be inside"):
        deploy_of(qdq)


# ----------------------------------------------------------------------------------------------
# Files


def test_large_models_keep_their_weights_beside_them(tmp_path: Path) -> None:
    net = Qdq([1, 40])
    y = net.node("MatMul", net.fake("x", 1.0), net.weight(np.ones((40, 40)), 1.0), name="fc")
    model = deploy_of(net.model(y))
    save_onnx(model, tmp_path / "small.onnx")
    save_onnx(model, tmp_path / "large.onnx", external_above=1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("large.onnx", "large.onnx.data", "small.onnx"),
    ]
    for name in ("small", "large"):
        (result,) = AscendExecutor(tmp_path / f"{name}.onnx").run(
            {"x": np.ones((1, 40), np.float32)}
        )
        assert result.tolist() == [[40.0] * 40]


def test_a_record_that_cannot_be_true_is_refused() -> None:
    good = 'record { key: "fc" value { scale_d: 0.5 offset_d: -128 scale_w: 0.25 offset_w: 0 } }'
    (record,) = parse_record(good)
    assert (record.scale_d, record.offset_d, record.scale_w) == (0.5, -128, (0.25,))
    with pytest.raises(ValueError, match="'fc' comes twice"):
        parse_record(good * 2)
    with pytest.raises(ValueError, match=r"'fc' lacks \['offset_d'\]"):
        parse_record(good.replace("offset_d: -128", ""))
    with pytest.raises(ValueError, match=r"'fc': offset_w must be 0.*symmetric; got 1"):
        parse_record(good.replace("offset_w: 0", "offset_w: 1"))
    with pytest.raises(ValueError, match="'fc': scale_w must be positive and finite"):
        parse_record(good.replace("0.25", "0.0"))
    with pytest.raises(ValueError, match="must be a ScaleOffsetRecord in protobuf text"):
        parse_record(good.replace("scale_d", "scale_x"))
