"""Rewrite a QDQ graph to a deploy model: AscendQuant, integer layers, AscendDequant."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann.device_nodes import write_device_nodes
from lightning_qat_exporters.cann.fake_quant import float_integers, scaled
from lightning_qat_exporters.cann.int4_packing import INPUT_AXIS, pack
from lightning_qat_exporters.cann.products import ANTI_QUANT, lacks
from lightning_qat_exporters.cann.qdq_graph.types import (
    IntegerLayer,
    QuantizedActivation,
    QuantizedGraph,
)
from lightning_qat_exporters.cann.rewrite import QuantizedForm, rewritten
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter

# ONNX's order of types, as the attribute ``dtype`` of CANN's operators counts.
_DTYPES = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 1}


def to_deploy(
    found: QuantizedGraph,
    opset: int | None = None,
    *,
    float_bias: bool = False,
    product: str | None = None,
) -> ir.Model:
    """Write a QDQ model with Ascend's operators; the matched model stays as it is.

    Args:
        found: The QDQ model, matched.
        opset: Version of the default domain, 11 to 18; ``None``: the lowest that expresses the
            model. A model below it stays where it is.
        float_bias: Add biases in float after the layers.
        product: One of ``products.WITHOUT``; operators that it lacks are not written.

    Returns:
        A model with AscendQuant, AscendDequant and AscendAntiQuant in the default domain.

    Raises:
        UnsupportedByTarget: A pair, bias or operator cannot be expressed; all are named.
        ValueError: ``opset`` is outside 11 to 18.
    """
    return rewritten(found, ToDeploy(float_bias=float_bias, product=product), opset)


def dequant_param(layer: IntegerLayer) -> NDArray[np.uint64]:
    """AscendDequant's parameter: the bits of float32 ``scale_d * scale_w`` as uint64.

    CANN's AscendDequant takes the low 32 bits as a float and wants the high 32 bits zero.
    """
    return layer.accumulator_scale.view(np.uint32).astype(np.uint64)


class ToDeploy(QuantizedForm):
    """Ascend's operators: AscendQuant, layers on integers, AscendDequant, AscendAntiQuant.

    Args:
        float_bias: Keep biases in float and add them after the layers.
        product: The product; without AscendAntiQuant there, float operators round to the same
            values.
    """

    def __init__(self, *, float_bias: bool, product: str | None = None) -> None:
        super().__init__(float_bias=float_bias)
        self.product = product

    def rewrite_recurrent(self, found: QuantizedGraph) -> QuantizedGraph:
        """Device nodes, which quantize their inputs themselves."""
        return write_device_nodes(found)

    def quantize(
        self, graph: GraphWriter, activation: QuantizedActivation, anchor: ir.Node
    ) -> ir.Value:
        """AscendQuant; its ``scale`` is the float32 reciprocal, as CANN multiplies by it."""
        source = activation.source
        name = activation.name
        if activation.narrowed:
            # AscendQuant saturates at its type; a smaller range is a float Clip before it.
            ends = np.array([activation.low, activation.high]) - activation.offset_d
            low, high = (ends.astype(np.float32) * activation.scale_d).astype(
                activation.real.numpy()
            )
            bounds = [
                graph.constant(f"{name}.quant.clip.min_val", low),
                graph.constant(f"{name}.quant.clip.max_val", high),
            ]
            source = graph.insert(
                anchor, "Clip", [source, *bounds], {}, f"{name}.quant.clip", dtype=activation.real
            )
        attributes = {
            "scale": float(np.float32(1) / activation.scale_d),
            "offset": float(activation.offset_d),
            "dst_type": activation.dst_type,
        }
        dtype = ir.DataType[activation.dst_type]
        return graph.insert(
            anchor, "AscendQuant", [source], attributes, f"{name}.quant", dtype=dtype
        )

    def dequantize(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """AscendAntiQuant; its ``scale`` is scale_d itself, CANN's parser negates the offset."""
        if lacks(self.product, ANTI_QUANT):
            name = f"{activation.name}.rounded"
            integers = float_integers(graph, activation, anchor, name)
            return scaled(graph, activation, integers, anchor, f"{name}.scaled")
        attributes: dict[str, Any] = {
            "scale": float(activation.scale_d),
            "offset": float(activation.offset_d),
            "dst_type": activation.dst_type,
        }
        if activation.real == ir.DataType.FLOAT16:
            attributes["dtype"] = _DTYPES[activation.real]
        # AMCT's tools find the node by this ending, and write the type of its input.
        name = f"{activation.name}.anti_quant"
        return graph.insert(
            anchor, "AscendAntiQuant", [read], attributes, name, dtype=activation.real
        )

    def integers(
        self, graph: GraphWriter, activation: QuantizedActivation, read: ir.Value, anchor: ir.Node
    ) -> ir.Value:
        """The output of AscendQuant."""
        return read

    def scale(self, graph: GraphWriter, layer: IntegerLayer, accumulator: ir.Value) -> ir.Value:
        """AscendDequant to float32 (``dtype`` 0) or float16 (1)."""
        name = f"{layer.name}.dequant"
        inputs = [accumulator, graph.constant(f"{name}.param", dequant_param(layer))]
        attributes = {"dtype": _DTYPES[layer.real]}
        result = graph.insert(
            layer.node, "AscendDequant", inputs, attributes, name, dtype=layer.real, after=True
        )
        # Not .dtype: a clone shares the type object with the model it was made from.
        accumulator.type = ir.TensorType(ir.DataType.INT32)
        return result

    def weight(self, layer: IntegerLayer) -> Array:
        """Integers as they are, or two of 4 bits in a byte."""
        if layer.wts_type == "INT4":
            return pack(layer.weight, INPUT_AXIS[layer.node.op_type])
        return layer.weight

    def operand(self, integers: Array) -> Array:
        """Integers as they are."""
        return integers
