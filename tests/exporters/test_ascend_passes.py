"""From QDQ models to AMCT's files: equal around every quantized layer, and hand-worked cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.amct.record import format_record, parse_record
from lightning_qat.export.protocol import UnsupportedByTarget
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.cann.deploy import to_deploy
from lightning_qat_exporters.cann.fake_quant import to_fake_quant
from lightning_qat_exporters.cann.layer_records import layer_records
from lightning_qat_exporters.cann.normalize.normalize import with_plain_constants
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedGraph
from lightning_qat_exporters.onnx_files.write import save_onnx
from tests.exporters.amct_goldens import (
    CASES,
    Case,
    load_case,
    quantized_layers,
    quantized_order,
)

Array = NDArray[Any]


def f32(values: Any) -> Array:
    return np.asarray(values, np.float32)


def i32(values: Any) -> Array:
    return np.asarray(values, np.int32)


class Qdq:
    """Builds a QDQ model node by node; every method returns the name of a value."""

    def __init__(self, shape: Sequence[int], opset: int = 18) -> None:
        self.shape, self.opset = shape, opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def node(self, op_type: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def constant(self, array: Any, dtype: Any = None) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(array, dtype)
        return name

    def fake(
        self,
        x: str,
        scale: float,
        zero: int = 0,
        dtype: Any = np.int8,
        clip: tuple[int, int] | None = None,
    ) -> str:
        """An activation's QuantizeLinear, Clip if asked, and DequantizeLinear."""
        factors = [self.constant(scale, np.float32), self.constant(zero, dtype)]
        x = self.node("QuantizeLinear", x, *factors)
        if clip is not None:
            x = self.node("Clip", x, *(self.constant(end, dtype) for end in clip))
        return self.node("DequantizeLinear", x, *factors)

    def weight(self, integers: Any, scale: Any, axis: int = 0) -> str:
        factors = [self.constant(integers, np.int8), self.constant(scale, np.float32)]
        return self.node("DequantizeLinear", *factors, axis=axis)

    def model(self, *outputs: str) -> ir.Model:
        """The model; its outputs are called ``y``, ``y1``, ..."""
        names = {value: f"y{i or ''}" for i, value in enumerate(outputs)}
        for node in self.nodes:
            node.input[:] = [names.get(value, value) for value in node.input]
            node.output[:] = [names.get(value, value) for value in node.output]
        graph = helper.make_graph(
            self.nodes,
            "main_graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(v, TensorProto.FLOAT, None) for v in names.values()],
            [numpy_helper.from_array(array, name) for name, array in self.constants.items()],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10
        )
        typed = onnx.shape_inference.infer_shapes(model)
        return ir.from_proto(typed)


def matched(model: ir.Model) -> QuantizedGraph:
    return find_quantized(with_plain_constants(model))


def deploy_of(model: ir.Model, opset: int = 11) -> ir.Model:
    return to_deploy(matched(model), opset)


def fake_quant_of(model: ir.Model, opset: int = 11) -> ir.Model:
    return to_fake_quant(matched(model), opset)


def proto(model: ir.Model) -> onnx.ModelProto:
    return ir.to_proto(model)


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


def run_float(model: ir.Model, x: Array, *, optimize: bool = True) -> list[Array]:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": x})]


# ----------------------------------------------------------------------------------------------
# AMCT's own networks


def folded(case: Case, layer: str, channel_axis: int) -> tuple[Array, Array, Array | None]:
    """Integers, scales and bias of one layer with batch norm folded in AMCT's arithmetic.

    All in float32: ``factor = gamma * (1 / sqrt(var + 1e-5))``, ``scale * |factor|``, integers of
    the unfolded weight times the factor's sign, ``(bias - mean) * (1 / sqrt(...)) * gamma + beta``.
    """
    state = case.tensor_state(layer)
    weight, scale, bias = state["weight"], state["wts_scales"], state.get("bias")
    shape = [1] * weight.ndim
    if scale.size > 1:
        shape[channel_axis] = -1
    integers = np.clip(np.rint(weight / scale.reshape(shape)), -128, 127)
    if "bn.gamma" in state:
        deviation = np.float32(1) / np.sqrt(state["bn.var"] + np.float32(1e-5))
        factor = state["bn.gamma"] * deviation
        shape[channel_axis] = -1
        integers = integers * np.sign(factor).reshape(shape)
        scale = scale * np.abs(factor)
        shifted = (np.float32(0) if bias is None else bias) - state["bn.mean"]
        bias = shifted * deviation * state["bn.gamma"] + state["bn.beta"]
    return integers.astype(np.int8), scale, bias


class CaseBuilder(Qdq):
    """A QDQ model of AMCT's numbers: scales of the record, weights of the trained state."""

    def __init__(self, case: Case) -> None:
        wide = any(record.act_type == "INT16" for record in case.records.values())
        (x,) = case.inputs.values()
        # QuantizeLinear takes 16 bits from opset 21 on.
        super().__init__(x.shape, opset=21 if wide else 18)
        self.case = case

    def layer(self, name: str, x: str, op_type: str, **attributes: Any) -> str:
        record = self.case.records[name]
        dtype = {"INT8": np.int8, "INT16": np.int16}[record.act_type]
        data = self.fake(x, record.scale_d, record.offset_d, dtype)
        axis = 1 if op_type == "ConvTranspose" else 0
        integers, scale, bias = folded(self.case, name, axis)
        weight = self.weight(integers, scale if scale.size > 1 else scale[0], axis)
        biases = [] if bias is None else [self.constant(bias)]
        if op_type == "MatMul":
            weight = self.node("Transpose", weight, perm=[1, 0])
            y = self.node("MatMul", data, weight, name=name)
            return self.node("Add", biases[0], y, name=f"{name}/Add") if biases else y
        return self.node(op_type, data, weight, *biases, name=name, **attributes)


def qdq_of(case: Case) -> ir.Model:
    net = CaseBuilder(case)
    three: dict[str, Any] = {"pads": [1, 1, 1, 1]}
    if case.name == "branch":
        r = net.node("Relu", net.layer("s", "x", "Conv"))
        a, b = net.layer("a", r, "Conv", **three), net.layer("b", r, "Conv")
        pool = net.node("MaxPool", r, kernel_shape=[3, 3], strides=[1, 1], **three)
        return net.model(net.node("Add", net.node("Add", a, b), pool))
    if case.name == "lin3d":
        hidden = net.node("Tanh", net.layer("l1", "x", "MatMul"))
        return net.model(net.layer("l2", hidden, "MatMul"))
    if case.name == "conv1d":
        y = net.node("Relu", net.layer("c", "x", "Conv", pads=[1, 1]))
        return net.model(net.layer("d", y, "ConvTranspose", pads=[1, 1], strides=[2]))
    y = net.node("Relu", net.layer("conv1", "x", "Conv", **three))
    groups = 8 if case.name == "conv_dw" else 1
    y = net.node("Relu", net.layer("conv2", y, "Conv", group=groups, auto_pad="NOTSET", **three))
    if case.name == "conv_deconv":
        y = net.layer("deconv", y, "ConvTranspose", strides=[2, 2])
    flat = net.node("Flatten", y, axis=1)
    return net.model(net.layer("fc", flat, "Gemm", transB=1))


@pytest.mark.parametrize("name", CASES)
def test_the_deploy_model_equals_amcts_around_every_layer(name: str) -> None:
    case = load_case(name)
    ours = proto(deploy_of(qdq_of(case)))
    assert quantized_layers(ours) == quantized_layers(case.deploy)
    assert quantized_order(ours) == quantized_order(case.deploy)
    assert [(i.domain, i.version) for i in ours.opset_import] == [("", 11)]
    assert ours.ir_version == case.deploy.ir_version
    assert [value.name for value in ours.graph.input] == ["x"]
    (actual,) = AscendExecutor(ours).run({"x": next(iter(case.inputs.values()))})
    # See test_ascend_executor: ONNX Runtime's optimizer changed the last bit of one case.
    tolerance = 1e-6 if name == "branch" else 0.0
    np.testing.assert_allclose(actual, case.outputs[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_fake_quant_model_gives_what_amcts_gives_in_onnx_runtime(name: str) -> None:
    case = load_case(name)
    model = fake_quant_of(qdq_of(case))
    onnx.checker.check_model(proto(model), full_check=True)
    x = next(iter(case.inputs.values()))
    # As it is written it adds whole numbers, which float32 holds: equal in any order, on any CPU.
    (as_written,) = run_float(model, x, optimize=False)
    np.testing.assert_array_equal(as_written, AscendExecutor(case.deploy_path).run(case.inputs)[0])
    # AMCT's numbers are a default session's. There ONNX Runtime folds the last Mul of "branch" into
    # weights, and sums of fractions depend on the CPU's order: a few of float32's last places.
    (actual,) = run_float(model, x)
    places = 4 if name == "branch" else 0
    tolerance = places * np.spacing(np.abs(case.outputs[0]).max())
    np.testing.assert_allclose(actual, case.outputs[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_the_record_equals_amcts_to_the_letter(name: str) -> None:
    case = load_case(name)
    found = matched(qdq_of(case))
    assert format_record(layer_records(found)) == case.record_text
    assert [remark.name for remark in (*found.left_float, *found.problems)] == []


# ----------------------------------------------------------------------------------------------
# Hand-worked numbers


def gemm_net(**options: Any) -> Qdq:
    """``y = x @ [[1, 2, 3], [4, 5, 6]].T * 0.5 + bias`` with an input of step 0.25 around -8."""
    net = Qdq([1, 3])
    data = net.fake("x", 0.25, -8, **options)
    weight = net.weight([[1, 2, 3], [4, 5, 6]], 0.5)
    net.node("Gemm", data, weight, net.constant([1.0, -0.1875], np.float32), name="fc", transB=1)
    return net


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
        ("AscendAntiQuant", "fc.antiquant"),
        ("MatMul", "fc"),
        ("AscendDequant", "fc.dequant"),
        ("Add", "join"),
    ]
    # scale_d itself, not its reciprocal; the offset with its own sign.
    assert attributes_of(model, "fc.antiquant") == {"scale": 0.5, "offset": 3.0}
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
        ("AscendAntiQuant", "join.antiquant"),
        ("AscendAntiQuant", "join_1.antiquant"),
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
        "along axis 0.",
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
    monkeypatch.setattr("lightning_qat_exporters.cann.downgrade_opset._ADAPTERS", ())
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
    with pytest.raises(ValueError, match=r"opset must be from 11 to 18, .* got 19\. Use 11"):
        deploy_of(gemm_net().model("v3"), 19)


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 6), (13, 7), (18, 8)])
def test_the_ir_version_goes_with_the_opset(opset: int, ir_version: int) -> None:
    assert deploy_of(gemm_net().model("v3"), opset).ir_version == ir_version


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
    with pytest.raises(ValueError, match=r"symmetric .* 'fc' is not"):
        parse_record(good.replace("offset_w: 0", "offset_w: 1"))
    with pytest.raises(ValueError, match="scale_w must be positive and finite; layer 'fc'"):
        parse_record(good.replace("0.25", "0.0"))
    with pytest.raises(ValueError, match="must be a ScaleOffsetRecord in protobuf text"):
        parse_record(good.replace("scale_d", "scale_x"))
