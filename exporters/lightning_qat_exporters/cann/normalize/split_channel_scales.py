"""Give activations with a scale per channel one scale; factors beside the pair do the rest.

``DQ(Q(x, s_c))`` is ``s_c * DQ(Q(x / s_c, 1))``. AscendQuant has one scale, so ``x`` is multiplied
by ``1 / s_c`` before the pair. A depthwise convolution takes ``s_c`` into the scales of its weight,
which is exact and stays on integers; for all other readers a Mul by ``s_c`` stands behind the pair,
and a layer behind it computes in float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.normalize.quantized_weight import insert_weight
from lightning_qat_exporters.cann.qdq_graph.constants import constant, is_constant
from lightning_qat_exporters.cann.qdq_graph.layers import WHY_REAL, read_weight
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.qparams import qparams_of, undoes, usable_scale
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer


class SplitChannelScales(ir.passes.InPlacePass):
    """Rewrite pairs of activations that have a scale per channel.

    Zero points that differ between channels are brought to the first one before the pair, as an
    Add of whole numbers; its ties may round to the other neighbour.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place."""
        split = 0
        for node in tuple(model.graph):
            if node.op_type == "QuantizeLinear" and not is_constant(node.inputs[0]):
                split += _split(model.graph, node)
        return ir.passes.PassResult(model, modified=split > 0)


def _split(graph: ir.Graph, quantize: ir.Node) -> bool:
    source = quantize.inputs[0]
    try:
        scale, zero_point, dtype = qparams_of(quantize)
    except CannotExpress:
        return False
    channels = max(scale.size, zero_point.size)
    if channels == 1 or source is None or not usable_scale(scale):
        return False
    pairs = _dequantizes(quantize)
    rank = _rank(source, pairs)
    if not (pairs and rank and _all_undo(pairs, quantize)):
        return False
    axis = quantize.attributes.get_int("axis", 1) % rank
    length = channels if source.shape is None else source.shape[axis]
    if isinstance(length, int) and length != channels:
        return False
    scale = np.broadcast_to(scale, channels)
    zero_point = np.broadcast_to(zero_point, channels)
    along = [-1] + [1] * (rank - 1 - axis)
    name, writer = label(quantize), GraphWriter(graph)
    kind = ir.DataType.from_numpy(scale.dtype)
    step = _Constants(graph, name, along)
    divided = writer.insert(
        quantize,
        "Mul",
        [source, step("reciprocal", 1 / scale)],
        {},
        f"{name}.by_channel",
        dtype=kind,
    )
    shift = zero_point - zero_point[0]
    if shift.any():
        inputs = [divided, step("shift", shift.astype(scale.dtype))]
        divided = writer.insert(quantize, "Add", inputs, {}, f"{name}.shifted", dtype=kind)
    one = initializer(graph, f"{name}.one", np.ones((), scale.dtype))
    zero = initializer(graph, f"{name}.zero_point", np.asarray(zero_point[0], dtype))
    quantize.replace_input_with(0, divided)
    for node in (quantize, *pairs):
        node.resize_inputs(3)
        node.replace_input_with(1, one)
        node.replace_input_with(2, zero)
        node.attributes.pop("axis", None)
    for pair in pairs:
        _scale_behind(graph, pair, scale, shift, axis, step)
    return True


class _Constants:
    """Initializers of a number per channel, in a shape that runs along the channels."""

    def __init__(self, graph: ir.Graph, name: str, along: list[int]) -> None:
        self._graph, self._name, self._along = graph, name, along

    def __call__(self, what: str, values: Array) -> ir.Value:
        return initializer(self._graph, f"{self._name}.{what}", values.reshape(self._along))


def _dequantizes(quantize: ir.Node) -> list[ir.Node]:
    found = []
    for node in quantize.outputs[0].consumers():
        found += list(node.outputs[0].consumers()) if node.op_type == "Clip" else [node]
    return found


def _rank(source: ir.Value, pairs: list[ir.Node]) -> int | None:
    """How many dimensions a tensor has; of a file without shapes, what a convolution tells."""
    if source.shape is not None:
        return len(source.shape)
    readers = [user for pair in pairs for user in pair.outputs[0].consumers()]
    for reader in readers:
        if reader.op_type in ("Conv", "ConvTranspose") and not reader.domain:
            try:
                return read_weight(reader).integers.ndim
            except CannotExpress:
                continue
    return None


def _all_undo(nodes: list[ir.Node], quantize: ir.Node) -> bool:
    qparams = qparams_of(quantize)
    axis = quantize.attributes.get_int("axis", 1)
    return all(
        node.op_type == "DequantizeLinear"
        and not node.attributes.get_int("block_size", 0)
        and undoes(node, qparams)
        and node.attributes.get_int("axis", 1) == axis
        for node in nodes
    )


def _scale_behind(
    graph: ir.Graph, pair: ir.Node, scale: Array, shift: Array, axis: int, step: _Constants
) -> None:
    """Take the factors into depthwise weights, and multiply by them for all other readers."""
    real = pair.outputs[0]
    uses = []
    for user, index in tuple(real.uses()):
        if shift.any() or axis != 1 or index or not _take_into_weight(graph, user, scale):
            uses.append((user, index))
    if not uses and not real.is_graph_output():
        return
    writer, kind, behind = GraphWriter(graph), ir.DataType.from_numpy(scale.dtype), real
    name = label(pair)
    if shift.any():
        inputs = [behind, step("shift", shift.astype(scale.dtype))]
        behind = writer.insert(pair, "Sub", inputs, {}, f"{name}.unshifted", dtype=kind, after=True)
    anchor = behind.producer()
    assert anchor is not None  # the pair, or the Sub behind it
    inputs = [behind, step("scale", scale)]
    scaled = writer.insert(anchor, "Mul", inputs, {}, f"{name}.scaled", dtype=kind, after=True)
    scaled.meta[WHY_REAL] = "its input has a scale per channel, and the device has one per tensor"
    writer.replace(real, scaled, anchor, uses)


def _take_into_weight(graph: ir.Graph, layer: ir.Node, scale: Array) -> bool:
    """Multiply the scales of a depthwise weight by those of its input's channels."""
    if layer.op_type != "Conv" or layer.domain:
        return False
    try:
        weight = read_weight(layer)
    except CannotExpress:
        return False
    rows, groups = weight.integers.shape[0], layer.attributes.get_int("group", 1)
    # A group reads one channel; it may write several.
    fits = groups == scale.size and weight.integers.shape[1] == 1 and rows % groups == 0
    if not fits or constant(layer.inputs[1]) is not None or not _fits_int8(weight.integers):
        return False
    product = weight.scale * np.repeat(scale.astype(np.float32), rows // groups)
    name = f"{label(layer)}.scaled_weight"
    layer.replace_input_with(1, insert_weight(graph, layer, name, weight.integers, product, 0))
    return True


def _fits_int8(integers: Array) -> bool:
    return bool(integers.min(initial=0) >= -128 and integers.max(initial=0) <= 127)
