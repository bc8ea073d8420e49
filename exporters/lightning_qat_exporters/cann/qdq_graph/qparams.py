"""Scale, zero point and integer type of QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann.qdq_graph.constants import required_constant


class NodeQParams(NamedTuple):
    """The quantization parameters that a node has, ``real = scale * (integer - zero_point)``.

    Args:
        scale: 1-D, in the node's real type.
        zero_point: 1-D, int64.
        dtype: Type of the integers.
    """

    scale: Array
    zero_point: Array
    dtype: np.dtype[Any]


def qparams_of(node: ir.Node) -> NodeQParams:
    """The quantization parameters of a QuantizeLinear or DequantizeLinear.

    Raises:
        CannotExpress: They are no constants.
    """
    scale = required_constant(node.inputs[1], "scale").reshape(-1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = required_constant(node.inputs[2], "zero point")
        return NodeQParams(scale, zero_point.reshape(-1).astype(np.int64), zero_point.dtype)
    kind = node.attributes.get_int("output_dtype", 0)
    # ONNX QuantizeLinear: without zero point and output_dtype the integers are uint8.
    dtype = ir.DataType(kind).numpy() if kind else np.dtype(np.uint8)
    return NodeQParams(scale, np.zeros(1, np.int64), dtype)


def undoes(dequantize: ir.Node, qparams: NodeQParams) -> bool:
    """Whether a DequantizeLinear has the parameters of the QuantizeLinear before it.

    A DequantizeLinear without a zero point has no integer type of its own.
    """
    other = qparams_of(dequantize)
    return (
        np.array_equal(qparams.scale, other.scale)
        and np.array_equal(qparams.zero_point, other.zero_point)
        and (len(dequantize.inputs) <= 2 or qparams.dtype == other.dtype)
    )


def broadcast_along(array: Array, rank: int, axis: int) -> Array:
    """A per-tensor or per-axis parameter in a shape that broadcasts against a tensor."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis] = array.size
    return array.reshape(shape)


def usable_scale(scale: Array | np.float32) -> bool:
    """Whether every scale and its reciprocal are positive normal float32 numbers.

    >>> usable_scale(np.float32(0.5)), usable_scale(np.float32(1e-39))
    (True, False)
    """
    return bool(np.all(_is_usable(scale)))


def first_unusable(scales: Array) -> Any:
    """The first of ``scales`` for which ``usable_scale`` is false."""
    return scales[~_is_usable(scales)][0]


def _is_usable(scale: Array | np.float32) -> Array:
    smallest = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        reciprocal = np.float32(1) / np.float32(scale)
    usable: Array = np.isfinite(scale) & (scale >= smallest) & (reciprocal >= smallest)
    return usable
