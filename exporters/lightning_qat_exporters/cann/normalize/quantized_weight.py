"""Write a quantized weight into a QDQ graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer


def insert_weight(
    graph: ir.Graph, layer: ir.Node, name: str, integers: Array, scale: Array, axis: int
) -> ir.Value:
    """Insert integers and their DequantizeLinear before a layer; return the real weight.

    Args:
        graph: The layer's graph.
        layer: The node before which the DequantizeLinear goes.
        name: Name of the node and of the integers.
        integers: Integers that fit int8.
        scale: One scale, or one for each index along ``axis``.
        axis: Axis of the scales.
    """
    scale = scale if scale.size > 1 else scale.reshape(())
    inputs = [
        initializer(graph, name, integers.astype(np.int8)),
        initializer(graph, f"{name}.scale", scale.astype(np.float32)),
    ]
    real = ir.Value(name=f"{name}.real", type=ir.TensorType(ir.DataType.FLOAT))
    writer = GraphWriter(graph)
    return writer.insert(layer, "DequantizeLinear", inputs, {"axis": axis}, name, output=real)
