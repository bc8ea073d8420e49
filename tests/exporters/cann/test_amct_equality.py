"""Our files of AMCT's networks equal AMCT's files around every quantized layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lightning_qat.amct.record import format_record
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.cann.layer_records import layer_records
from tests.exporters.cann.amct_goldens import (
    CASES,
    Case,
    load_case,
    quantized_layers,
    quantized_order,
)
from tests.exporters.cann.qdq_graphs import (
    Array,
    Qdq,
    deploy_of,
    fake_quant_of,
    matched,
    proto,
    run_float,
)

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
