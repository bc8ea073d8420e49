"""Take float weights that lie on a grid as the integers that they were.

TensorFlow's converters fold the quantization of a weight into its float values, so a QAT model
comes with weights that are products of integers and scales, rounded to float32, and no node that
says so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array
from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.cann.normalize.propagate_pairs import pairs_behind
from lightning_qat_exporters.cann.normalize.quantized_weight import insert_weight
from lightning_qat_exporters.cann.qdq_graph.constants import constant
from lightning_qat_exporters.cann.qdq_graph.names import label

FOUND = "lightning_qat.grid_weights"
"""Where a model's ``meta`` has the layers whose weights were recognised."""

_LARGEST = 127
_PRECISION = 2.0**-21
"""A value may be off by four roundings to float32: the weight's, the scale's and a batch norm's."""


class RecogniseGridWeights(ir.passes.InPlacePass):
    """Write the weight of a layer with quantized input as integers where all of it is on a grid.

    Symmetric grids of up to 127 steps to either side, one scale per output channel. A channel of
    random values is on such a grid with a chance of one in 8,000 to the power of their number.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite ``model`` in place, and list the layers in ``model.meta[FOUND]``."""
        quantized = pairs_behind(model.graph).keys()
        found = [
            label(node)
            for node in tuple(model.graph)
            if len(node.inputs) > 1
            and node.inputs[0] in quantized
            and _recognise(model.graph, node)
        ]
        model.meta[FOUND] = found
        return ir.passes.PassResult(model, modified=bool(found))


def grid_of(weight: Array, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]] | None:
    """The integers and the scales per index of an axis of a weight on a grid; ``None``: on none.

    >>> integers, scale = grid_of(np.float32([[0.25, -0.5], [0.75, 0.25]]), 0)
    >>> integers.tolist(), scale.tolist()
    ([[1, -2], [3, 1]], [0.25, 0.25])
    >>> grid_of(np.float32([[0.1234567, 0.7654321, 0.3141592]]), 0) is None
    True
    """
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1).astype(np.float64)
    largest = np.abs(rows).max(1, initial=0.0)
    steps = np.zeros(len(rows), np.int64)
    steps[largest == 0] = 1
    for count in range(1, _LARGEST + 1):
        open_rows = np.flatnonzero(steps == 0)
        if not open_rows.size:
            break
        levels = rows[open_rows] * (count / largest[open_rows])[:, None]
        off = np.abs(levels - np.rint(levels)).max(1)
        steps[open_rows[off <= count * _PRECISION]] = count
    if (steps == 0).any():
        return None
    scale = np.where(largest > 0, largest / steps, 1.0).astype(np.float32)
    along = [-1 if place == axis else 1 for place in range(weight.ndim)]
    integers = np.rint(weight / scale.reshape(along)).astype(np.int8)
    return integers, scale


def _recognise(graph: ir.Graph, node: ir.Node) -> bool:
    if node.op_type not in LAYER_TYPES or node.domain:
        return False
    weight = constant(node.inputs[1])
    if weight is None or weight.dtype != np.float32 or weight.ndim < 2 or not weight.size:
        return False
    if not np.isfinite(weight).all():
        return False
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    grouped = node.op_type == "ConvTranspose" and node.attributes.get_int("group", 1) > 1
    axis = 0 if node.op_type == "Conv" or transposed else 1
    if grouped or (node.op_type == "MatMul" and weight.ndim != 2):
        return False
    on_grid = grid_of(weight, axis)
    if on_grid is None:
        return False
    integers, scale = on_grid
    name = f"{label(node)}.grid_weight"
    node.replace_input_with(1, insert_weight(graph, node, name, integers, scale, axis))
    return True
