"""Split weights whose zero point takes them out of int8 into two layers that int8 can hold."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.cann.normalize.quantized_weight import insert_weight
from lightning_qat_exporters.cann.qdq_graph.layers import LayerWeight, read_weight
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import constant_dequantize

SHIFT = ".shift"
"""Ending of the second layer's name, behind that of the layer that was split."""

_LEVELS = 255


class SplitAsymmetricWeights(ir.passes.InPlacePass):
    """Make layers with an asymmetric weight symmetric, without rounding anything.

    ``q - zero_point`` of an asymmetric 8-bit weight may leave int8, and Ascend's integer layers
    have no zero point for weights. ``W = A + c`` with ``A`` in int8 and one integer ``c`` per
    channel, and a layer is linear: ``layer(x, W) = layer(x, A) + layer(x, c)``. The second layer
    has ones for weights and takes ``|c|`` into its scale; where the scale is one for all channels
    it has one output channel.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        split = 0
        for node in tuple(model.graph):
            if node.op_type in LAYER_TYPES and not node.domain and len(node.inputs) > 1:
                weight = _wide_weight(node)
                if weight is not None:
                    _split(model.graph, node, weight)
                    split += 1
        return ir.passes.PassResult(model, modified=split > 0)


def _wide_weight(node: ir.Node) -> LayerWeight | None:
    dequantize = constant_dequantize(node.inputs[1])
    if dequantize is None or len(dequantize.inputs) < 3:
        return None
    try:
        weight = read_weight(node)
    except CannotExpress:
        return None
    integers = weight.integers
    if not integers.size or (integers.min() >= -128 and integers.max() <= 127):
        return None
    axes = tuple(a for a in range(integers.ndim) if a != weight.channel_axis)
    widths = integers.max(axes).astype(int) - integers.min(axes)
    return weight if widths.max() <= _LEVELS else None


def _split(graph: ir.Graph, node: ir.Node, weight: LayerWeight) -> None:
    name = label(node)
    shift = _shift(weight)
    groups = node.attributes.get_int("group", 1)
    along = [1] * weight.integers.ndim
    along[weight.channel_axis] = -1
    near = weight.integers - shift.reshape(along)
    scale = weight.scale
    if node.op_type == "ConvTranspose" and scale.size > 1:
        scale = scale[: weight.integers.shape[1]]  # the same in every group
    one_channel = scale.size == 1 and shift.size == 1 and groups == 1
    shape = list(weight.integers.shape)
    if one_channel:
        shape[weight.channel_axis] = 1
    ones = np.broadcast_to(np.sign(shift).reshape(along), shape)
    # Where nothing is shifted the weight is 0 and any scale will do.
    size = scale * np.maximum(np.abs(shift), 1).astype(np.float32)
    attributes = [a for a in node.attributes.values() if a.name != "transB"]
    output = ir.Value(name=f"{name}.shift_output", type=node.outputs[0].type)
    shifted = ir.Node(
        node.domain,
        node.op_type,
        [
            node.inputs[0],
            insert_weight(graph, node, f"{name}.shift_weight", ones, size, weight.channel_axis),
        ],
        attributes,
        outputs=[output],
        name=f"{name}{SHIFT}",
    )
    old = node.outputs[0]
    uses = tuple(old.uses())
    real = insert_weight(graph, node, f"{name}.near_weight", near, scale, weight.channel_axis)
    node.replace_input_with(1, real)
    node.attributes.pop("transB", None)
    total = ir.Value(type=old.type, shape=old.shape)
    join = ir.node("Add", [old, output], outputs=[total], name=f"{name}.shift_add")
    graph.insert_after(node, [shifted, join])
    for user, index in uses:
        user.replace_input_with(index, total)
    for index, value in enumerate(graph.outputs if old.is_graph_output() else ()):
        if value is old:
            graph.outputs[index] = total
            total.name, old.name = old.name, f"{name}.near_output"


def _shift(weight: LayerWeight) -> Array:
    """The smallest ``c`` that brings the integers into int8: one for all, or one per channel."""
    integers = weight.integers
    axes: tuple[int, ...] | None = None
    if int(integers.max()) - int(integers.min()) > _LEVELS:
        axes = tuple(a for a in range(integers.ndim) if a != weight.channel_axis)
    low, high = np.reshape(integers.min(axes), -1), np.reshape(integers.max(axes), -1)
    shift: Array = np.minimum(low.astype(int) + 128, 0) + np.maximum(high.astype(int) - 127, 0)
    return shift
