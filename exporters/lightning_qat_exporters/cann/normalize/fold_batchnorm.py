"""Fold batch norms that a QDQ model still has into the quantized layers before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.cann.qdq_graph.constants import constant
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.cann.qdq_graph.types import Array, QuantizedLayer
from lightning_qat_exporters.qdq.initializers import initializer

_FOLDS_INTO = ("Conv", "ConvTranspose", "Gemm")


class FoldBatchNorm(ir.passes.InPlacePass):
    """Fold each batch norm that alone reads a quantized layer.

    The integers take the sign of gamma, the scales ``|gamma| / sqrt(var + epsilon)``, so nothing is
    rounded anew; the arithmetic is AMCT's, in float32. A batch norm stays where that is not exact:
    gamma is 0, or negative over an integer of -128, whose opposite int8 lacks.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        if not any(node.op_type == "BatchNormalization" for node in model.graph):
            return ir.passes.PassResult(model, modified=False)
        folded = 0
        for layer in find_quantized(model).layers:
            norm = _norm_after(layer)
            if norm is not None and _fold(model.graph, layer, norm):
                folded += 1
        return ir.passes.PassResult(model, modified=folded > 0)


@dataclass(frozen=True, eq=False)
class _Norm:
    node: ir.Node
    gamma: Array
    beta: Array
    mean: Array
    inverse_deviation: Array


def _norm_after(layer: QuantizedLayer) -> _Norm | None:
    output = layer.node.outputs[0]
    readers = output.consumers()
    if layer.node.op_type not in _FOLDS_INTO or len(readers) != 1 or output.is_graph_output():
        return None
    (node,) = readers
    if node.op_type != "BatchNormalization" or node.inputs[0] is not output:
        return None
    if node.attributes.get_int("training_mode", 0) or _read(node.outputs[1:]):
        return None
    statistics = [constant(value) for value in node.inputs[1:5]]
    if any(array is None for array in statistics):
        return None
    gamma, beta, mean, var = (np.asarray(a, np.float32) for a in statistics)
    epsilon = np.float32(node.attributes.get_float("epsilon", 1e-5))
    return _Norm(node, gamma, beta, mean, np.float32(1) / np.sqrt(var + epsilon))


def _read(values: Sequence[ir.Value]) -> bool:
    return any(value.uses() or value.is_graph_output() for value in values)


def _fold(graph: ir.Graph, layer: QuantizedLayer, norm: _Norm) -> bool:
    node, axis = layer.node, layer.channel_axis
    factor = norm.gamma * norm.inverse_deviation
    groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    channels = layer.weight.shape[axis] * groups
    # A transposed convolution's scales run over the channels of one group.
    if factor.size != channels or groups > 1 or not factor.all():
        return False
    along = [1] * layer.weight.ndim
    along[axis] = -1
    flipped = np.broadcast_to((factor < 0).reshape(along), layer.weight.shape)
    if (layer.weight[flipped] == -128).any():
        return False
    integers = np.where(flipped, -layer.weight, layer.weight)
    scale = layer.scale_w * np.abs(factor)
    bias = np.float32(0) if layer.bias is None else layer.bias.astype(np.float32)
    shifted = (bias - norm.mean) * norm.inverse_deviation * norm.gamma + norm.beta
    rewrite_layer(graph, layer, integers, scale, shifted)
    norm.node.outputs[0].replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)
    graph.remove(norm.node, safe=True)
    return True


def rewrite_layer(
    graph: ir.Graph,
    layer: QuantizedLayer,
    integers: Array,
    scale: Array,
    bias: Array,
) -> None:
    """Give a layer other constants: int8 weights in the layout of ``layer``, and a real bias."""
    node, name = layer.node, layer.name
    weight = ir.Value(name=f"{name}.folded_weight.real", type=ir.TensorType(ir.DataType.FLOAT))
    dequantize = ir.node(
        "DequantizeLinear",
        [
            initializer(graph, f"{name}.folded_weight", integers.astype(np.int8)),
            initializer(graph, f"{name}.folded_scale", scale),
        ],
        {"axis": layer.channel_axis},
        outputs=[weight],
        name=f"{name}.folded_weight",
    )
    graph.insert_before(node, dequantize)
    node.resize_inputs(3)
    node.replace_input_with(1, weight)
    node.replace_input_with(2, initializer(graph, f"{name}.folded_bias", bias.astype(np.float32)))
    node.attributes.pop("transB", None)
