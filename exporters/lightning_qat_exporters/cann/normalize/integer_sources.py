"""Give integers that no QuantizeLinear made a pair: graph inputs of uint8, results of integer ops.

A device's layers read what AscendQuant wrote, for the zero point stands there alone. So integers
are made real and quantized again: ``rint(((q - zero_point) * scale) / scale) + zero_point`` is
``q`` again, for the product and the quotient are off by less than a millionth of a step.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import CannotExpress
from lightning_qat_exporters.cann.qdq_graph.activations import quantize_before
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.qparams import qparams_of
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import constant_dequantize
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer


class PairIntegerSources(ir.passes.InPlacePass):
    """Replace the DequantizeLinear of foreign integers by arithmetic and a Q/DQ pair."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place; integers of more than 16 bits become real only."""
        rewritten = 0
        for node in tuple(model.graph):
            if node.op_type == "DequantizeLinear" and not node.domain and _is_foreign(node):
                rewritten += _rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=rewritten > 0)


def _is_foreign(dequantize: ir.Node) -> bool:
    constant = constant_dequantize(dequantize.outputs[0]) is not None
    return not constant and quantize_before(dequantize) is None


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    try:
        scale, zero_point, dtype = qparams_of(node)
    except CannotExpress:
        return False
    value = node.inputs[0]
    if scale.size != 1 or zero_point.size != 1 or value is None:
        return False
    if value.dtype is not None:
        dtype = value.dtype.numpy()
    writer, name = GraphWriter(graph), label(node)
    real_type = ir.DataType.from_numpy(scale.dtype)
    numbers = {"offset": zero_point.astype(scale.dtype).reshape(()), "scale": scale.reshape(())}
    of = {key: initializer(graph, f"{name}.{key}", array) for key, array in numbers.items()}
    real = writer.cast(node, value, real_type, f"{name}.cast")
    if zero_point.any():
        real = writer.insert(node, "Sub", [real, of["offset"]], {}, f"{name}.sub", dtype=real_type)
    real = writer.insert(node, "Mul", [real, of["scale"]], {}, f"{name}.mul", dtype=real_type)
    if dtype.itemsize > 2:
        writer.replace(node.outputs[0], real, node)
        return True
    zero = initializer(graph, f"{name}.zero_point", np.asarray(zero_point[0], dtype))
    pair = [node.inputs[1], zero]
    integer_type = ir.DataType.from_numpy(dtype)
    integers = writer.insert(
        node, "QuantizeLinear", [real, *pair], {}, f"{name}.quantize", dtype=integer_type
    )
    node.replace_input_with(0, integers)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        node.resize_inputs(3)
        node.replace_input_with(2, zero)
    return True
