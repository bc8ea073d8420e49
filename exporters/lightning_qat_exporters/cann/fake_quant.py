"""Rewrite a QDQ graph to AMCT's fake-quant model."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann.device_nodes import round_recurrent_biases
from lightning_qat_exporters.cann.qdq_graph.types import (
    IntegerLayer,
    QuantizedActivation,
    QuantizedGraph,
)
from lightning_qat_exporters.cann.rewrite import CONV_OPS, QuantizedForm, rewritten
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter


def to_fake_quant(
    found: QuantizedGraph, opset: int | None = None, *, float_bias: bool = False
) -> ir.Model:
    """Write a QDQ model as float operators on integer values, in AMCT's form.

    ``Mul(1/scale_d) -> Round -> Add(offset) -> Clip -> Sub(offset) -> layer on integer-valued float
    weights -> Mul(scale_d * scale_w)``. Exact while an accumulator stays below 2**24.

    Args:
        found: The QDQ model, matched; it stays as it is.
        opset: Version of the default domain, 11 to 18; ``None``: the lowest that expresses the
            model. A model below it stays where it is.
        float_bias: Add biases in float after the layers.

    Returns:
        A model of standard operators that any ONNX runtime runs.

    Raises:
        UnsupportedByTarget: A pair, bias or operator cannot be expressed; all are named.
        ValueError: ``opset`` is outside 11 to 18.
    """
    return rewritten(found, ToFakeQuant(float_bias=float_bias), opset)


def float_integers(
    graph: GraphWriter, activation: QuantizedActivation, anchor: ir.Node, name: str
) -> ir.Value:
    """Write ``Mul -> Round -> Add -> Clip -> Sub``: the integers around zero, as float32."""
    numbers = {
        "scale": np.float32(1) / activation.scale_d,
        "offset": np.float32(activation.offset_d),
        "min_val": np.float32(activation.low),
        "max_val": np.float32(activation.high),
    }
    of = {key: graph.constant(f"{name}.{key}", value) for key, value in numbers.items()}
    value = activation.source
    if activation.real == ir.DataType.FLOAT16:
        value = graph.cast(anchor, value, ir.DataType.FLOAT, f"{name}.cast")
    value = graph.insert(anchor, "Mul", [value, of["scale"]], {}, f"{name}.mul")
    value = graph.insert(anchor, "Round", [value], {}, f"{name}.round")
    value = graph.insert(anchor, "Add", [value, of["offset"]], {}, f"{name}.add")
    bounds = [of["min_val"], of["max_val"]]
    value = graph.insert(anchor, "Clip", [value, *bounds], {}, f"{name}.clip")
    return graph.insert(anchor, "Sub", [value, of["offset"]], {}, f"{name}.sub")


def scaled(
    graph: GraphWriter,
    activation: QuantizedActivation,
    integers: ir.Value,
    anchor: ir.Node,
    name: str,
) -> ir.Value:
    """Write ``Mul(scale_d)``: the real values of integers around zero."""
    scale = graph.constant(f"{name}.scale", activation.scale_d)
    value = graph.insert(anchor, "Mul", [integers, scale], {}, f"{name}.mul")
    if activation.real == ir.DataType.FLOAT16:
        value = graph.cast(anchor, value, activation.real, f"{name}.cast")
    return value


class ToFakeQuant(QuantizedForm):
    """AMCT's float operators for the same arithmetic."""

    def rewrite_recurrent(self, found: QuantizedGraph) -> QuantizedGraph:
        """LSTM and GRU stay; their biases get the values of the device node's integers."""
        round_recurrent_biases(found)
        return found

    def quantize(
        self, graph: GraphWriter, activation: QuantizedActivation, anchor: ir.Node
    ) -> ir.Value:
        """``Mul -> Round -> Add -> Clip -> Sub``: integers around zero, as float32."""
        return float_integers(graph, activation, anchor, f"{activation.name}.quant.fakequant")

    def dequantize(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """``Mul(scale_d)``."""
        return scaled(graph, activation, read, anchor, f"{activation.name}.fakeantiquant")

    def integers(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """The output of Clip, cast to the integer type."""
        subtract = read.producer()
        assert subtract is not None  # quantize wrote it
        clipped = subtract.inputs[0]
        assert clipped is not None
        dtype = ir.DataType[activation.dst_type]
        return graph.cast(anchor, clipped, dtype, f"{activation.name}.quant.fakequant.integers")

    def scale(self, graph: GraphWriter, layer: IntegerLayer, accumulator: ir.Value) -> ir.Value:
        """``Mul(scale_d * scale_w)``, the product in float32."""
        name = f"{layer.name}.fakedequant"
        trailing = layer.weight.ndim - 2 if layer.node.op_type in CONV_OPS else 0
        # A vector stays one.
        leading = [] if accumulator.shape is not None and len(accumulator.shape) == 1 else [1]
        product = layer.accumulator_scale.reshape(*leading, -1, *[1] * trailing)
        inputs = [accumulator, graph.constant(f"{name}.dqscale", product)]
        value = graph.insert(layer.node, "Mul", inputs, {}, f"{name}.mul", after=True)
        # Not .dtype: a clone shares the type object with the model it was made from.
        accumulator.type = ir.TensorType(ir.DataType.FLOAT)
        if layer.real == ir.DataType.FLOAT16:
            anchor = value.producer()
            assert anchor is not None  # just inserted
            value = graph.cast(anchor, value, layer.real, f"{name}.cast", after=True)
        return value

    def weight(self, layer: IntegerLayer) -> ir.LazyTensor:
        """Integer-valued float32, computed when it is written: four times the integers' size."""
        integers = layer.weight
        return ir.LazyTensor(
            lambda: ir.Tensor(self.operand(integers)),
            dtype=ir.DataType.FLOAT,
            shape=ir.Shape(integers.shape),
        )

    def operand(self, integers: Array) -> Array:
        """Integer-valued float32."""
        return integers.astype(np.float32)
