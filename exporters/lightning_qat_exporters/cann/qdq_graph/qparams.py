"""Scale, zero point and integer type of QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
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


def broadcast_along(array: Array, shape: Sequence[int], axis: int) -> Array:
    """A per-tensor or per-axis parameter in a form that broadcasts against a tensor of a shape.

    Raises:
        CannotExpress: There are neither one nor as many parameters as the axis is long.
    """
    if array.size == 1:
        return array.reshape(())
    check_along(array, shape, axis, "parameters")
    along = [1] * len(shape)
    along[axis] = array.size
    return array.reshape(along)


def check_along(values: Array, shape: Iterable[Any], axis: int, what: str) -> None:
    """Check that a quantized constant has one scale or zero point, or one for each of its channels.

    Args:
        values: Scales or zero points.
        shape: Of the constant; unknown sizes are no integers.
        axis: Of the channels.
        what: The values, for the message.

    Raises:
        CannotExpress: There are others.
    """
    sizes = [*shape]
    length = sizes[axis] if -len(sizes) <= axis < len(sizes) else 0
    if values.size > 1 and isinstance(length, int) and length != values.size:
        raise CannotExpress(
            f"a constant of shape {sizes} must have one scale and zero point, or as many as its "
            f"axis {axis} is long; got {values.size} {what}"
        )


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
