"""QDQ graphs written by hand, and what a deploy model of them computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_qat_exporters.cann.deploy import to_deploy
from lightning_qat_exporters.cann.fake_quant import to_fake_quant
from lightning_qat_exporters.cann.normalize.normalize import with_plain_constants
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedGraph

Array = NDArray[Any]


def f32(values: Any) -> Array:
    return np.asarray(values, np.float32)


class Qdq:
    """Builds a QDQ model node by node; every method returns the name of a value."""

    def __init__(self, shape: Sequence[int] | None, opset: int = 18) -> None:
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


def run_float(model: ir.Model, x: Array, *, optimize: bool = True) -> list[Array]:
    options = ort.SessionOptions()
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    data = proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, {"x": x})]


# ----------------------------------------------------------------------------------------------
# Hand-worked numbers


def gemm_net(**options: Any) -> Qdq:
    """``y = x @ [[1, 2, 3], [4, 5, 6]].T * 0.5 + bias`` with an input of step 0.25 around -8."""
    net = Qdq([1, 3])
    data = net.fake("x", 0.25, -8, **options)
    weight = net.weight([[1, 2, 3], [4, 5, 6]], 0.5)
    net.node("Gemm", data, weight, net.constant([1.0, -0.1875], np.float32), name="fc", transB=1)
    return net
