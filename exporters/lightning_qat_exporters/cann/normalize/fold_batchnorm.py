"""Fold batch norms that a QDQ model still has into the quantized layers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.normalize.quantized_weight import insert_weight
from lightning_qat_exporters.cann.qdq_graph.activations import quantize_before, read_pair
from lightning_qat_exporters.cann.qdq_graph.constants import constant, followed, is_constant
from lightning_qat_exporters.cann.qdq_graph.layers import LayerParts, read_layer
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.onnx_files.graph_writer import initializer

_FOLDS_INTO = ("Conv", "ConvTranspose", "Gemm")


class FoldBatchNorm(ir.passes.InPlacePass):
    """Fold each batch norm that alone reads a quantized layer.

    The integers take the sign of gamma, the scales ``|gamma| / sqrt(var + epsilon)``, so nothing is
    rounded anew; the arithmetic is AMCT's, in float32. A batch norm stays where that is not exact:
    gamma is 0, or negative over an integer of -128, whose opposite int8 lacks.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        folded = 0
        for node in tuple(model.graph):
            layer = _layer_before(node) if node.op_type == "BatchNormalization" else None
            norm = None if layer is None else _norm(node)
            if layer is not None and norm is not None:
                folded += _fold(model.graph, layer, norm)
        return ir.passes.PassResult(model, modified=folded > 0)


@dataclass(frozen=True, eq=False)
class _Norm:
    node: ir.Node
    gamma: Array
    beta: Array
    mean: Array
    inverse_deviation: Array


def _layer_before(norm: ir.Node) -> ir.Node | None:
    """The layer whose output a batch norm alone reads."""
    value = norm.inputs[0]
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type not in _FOLDS_INTO or node.domain:
        return None
    return None if len(value.uses()) != 1 or value.is_graph_output() else node


def _norm(node: ir.Node) -> _Norm | None:
    """The statistics of a batch norm that has constant ones."""
    if node.attributes.get_int("training_mode", 0) or _is_read(node.outputs[1:]):
        return None
    statistics = [constant(value) for value in node.inputs[1:5]]
    if any(array is None for array in statistics):
        return None
    gamma, beta, mean, var = (np.asarray(a, np.float32) for a in statistics)
    epsilon = np.float32(node.attributes.get_float("epsilon", 1e-5))
    return _Norm(node, gamma, beta, mean, np.float32(1) / np.sqrt(var + epsilon))


def _is_read(values: Sequence[ir.Value]) -> bool:
    return any(value.uses() or value.is_graph_output() for value in values)


def _parts(node: ir.Node) -> LayerParts | None:
    """The layer as integers, if it is quantized; only its own surroundings are matched."""
    dequantize = _dequantize_before(node.inputs[0])
    quantize = None if dequantize is None else quantize_before(dequantize)
    if dequantize is None or quantize is None or is_constant(quantize.inputs[0]):
        return None
    try:
        return read_layer(node, {dequantize: read_pair(quantize)})
    except CannotExpress:
        return None


def _dequantize_before(value: ir.Value | None) -> ir.Node | None:
    for node in followed(value):
        value = node.inputs[0]
    return None if value is None else value.producer()


def _fold(graph: ir.Graph, node: ir.Node, norm: _Norm) -> bool:
    parts = _parts(node)
    if parts is None:
        return False
    integers, scale, axis, channels, _ = parts.weight
    factor = norm.gamma * norm.inverse_deviation
    groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    # A transposed convolution's scales run over the channels of one group.
    if factor.size != channels or groups > 1 or not factor.all():
        return False
    along = [1] * integers.ndim
    along[axis] = -1
    flipped = np.broadcast_to((factor < 0).reshape(along), integers.shape)
    if (integers[flipped] == -128).any():
        return False
    real = parts.bias.real
    bias = np.float32(0) if real is None else real.astype(np.float32)
    shifted = (bias - norm.mean) * norm.inverse_deviation * norm.gamma + norm.beta
    name = label(node)
    signed = np.where(flipped, -integers.astype(np.int8), integers)
    weight = insert_weight(
        graph, node, f"{name}.folded_weight", signed, scale * np.abs(factor), axis
    )
    node.resize_inputs(3)
    node.replace_input_with(1, weight)
    added = initializer(graph, f"{name}.folded_bias", shifted.astype(np.float32))
    node.replace_input_with(2, added)
    node.attributes.pop("transB", None)
    norm.node.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    graph.remove(norm.node, safe=True)
    return True
