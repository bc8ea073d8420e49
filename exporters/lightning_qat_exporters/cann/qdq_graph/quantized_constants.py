"""Quantized constants: integers, stored or computed here, behind a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.cann.qdq_graph.constants import (
    FOLLOWED,
    MOST_FOLLOWED,
    constant,
    is_constant,
    required_constant,
)
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.qparams import (
    broadcast_along,
    check_along,
    first_unusable,
    qparams_of,
    undoes,
    usable_scale,
)
from lightning_qat_exporters.cann.qdq_graph.types import UnusableValues


class ConstantIntegers(NamedTuple):
    """A quantized constant, ``real = scale * integers``.

    Args:
        integers: Integers, the zero point subtracted; they need not fit ``dtype``.
        scale: float32, 1-D, of length 1 or as long as ``axis``; or, of a grouped transposed
            convolution, ``(in, out / groups, ...)``, of length ``out``, group by group.
        axis: The axis of the scales.
        dtype: Type in which the model stores the integers.
    """

    integers: Array
    scale: NDArray[np.float32]
    axis: int
    dtype: np.dtype[Any]


def constant_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant behind ``value``, also transposed and reshaped."""
    for move in _followed(value):
        value = move.inputs[0]
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    value = node.inputs[0]
    for _ in range(MOST_FOLLOWED):
        inner = value.producer() if value is not None else None
        if inner is None or inner.op_type not in ("Clip", "QuantizeLinear"):
            break
        value = inner.inputs[0]
    return node if is_constant(value) else None


def constant_integers(value: ir.Value | None) -> ConstantIntegers:
    """The integers of a quantized constant, also transposed, the zero point subtracted.

    Raises:
        CannotExpress: It has a scale per block, or is no quantized constant.
        UnusableValues: It holds NaN or infinity.
    """
    dequantize = constant_dequantize(value)
    if dequantize is None:
        raise CannotExpress("its weight is no quantized constant")
    stored, zero_point = _stored(dequantize)
    scale = required_constant(dequantize.inputs[1], "scale").astype(np.float32)
    if scale.ndim > 1 or dequantize.attributes.get_int("block_size", 0) > 0:
        raise CannotExpress("its weight has one scale per block; use one per tensor or per channel")
    axis: int = dequantize.attributes.get_int("axis", 1)
    # A file may declare another shape than its constant has.
    check_along(scale, stored.shape, axis, "scales")
    integers = stored
    if zero_point.any():
        wide = np.int16 if stored.dtype.itemsize == 1 else np.int64
        along = broadcast_along(zero_point, stored.shape, axis)
        integers = stored.astype(wide) - along.astype(wide)
    axis %= max(stored.ndim, 1)
    moves = _moves(value)
    if not any(move.op_type == "Reshape" for move in moves):
        for perm in (_permutation(move, integers.ndim) for move in moves):
            integers, axis = integers.transpose(perm), perm.index(axis)
        return ConstantIntegers(integers, scale.reshape(-1), axis, stored.dtype)
    # Of which scale each value is, wherever it goes.
    owners = np.broadcast_to(
        broadcast_along(np.arange(scale.size, dtype=np.int32), integers.shape, axis), integers.shape
    )
    for move in moves:
        integers, owners = _moved(integers, move), _moved(owners, move)
    axis, order = _channels(owners, scale.size)
    return ConstantIntegers(integers, scale.reshape(-1)[order], axis, stored.dtype)


_WEIGHT_MAKERS = (*FOLLOWED, "Reshape", "DequantizeLinear", "QuantizeLinear", "Clip")


def layer_weight_bytes(model: ir.Model) -> int:
    """Bytes of the constant weights of all layers in float32, one that they share for each.

    Files have a weight for every layer, in float32 in the simulation; none is computed here.
    """
    sizes: dict[ir.Value | None, int] = {}
    total = 0
    for node in model.graph:
        value = node.inputs[1] if node.op_type in LAYER_TYPES and len(node.inputs) > 1 else None
        passed = []
        while value is not None and value not in sizes:
            passed.append(value)
            tensor = ir.convenience.get_const_tensor(value)
            maker = value.producer()
            if tensor is not None:
                sizes[value] = tensor.size
            elif maker is None or maker.op_type not in _WEIGHT_MAKERS:
                sizes[value] = 0
            else:
                value = maker.inputs[0]
        sizes.update(dict.fromkeys(passed, sizes.get(value, 0)))
        total += 4 * sizes.get(value, 0)
    return total


def real_constant(value: ir.Value | None) -> Array | None:
    """The real values of a constant, quantized or not.

    ``(q - zero_point) * scale`` as ONNX ``DequantizeLinear`` defines it. A quantized 32-bit
    integer is multiplied in float64, where the product is exact.

    Returns:
        Float values in the constant's own layout, or None where ``value`` is no such constant.

    Raises:
        CannotExpress: Its scale is no constant.
        UnusableValues: It holds NaN or infinity.
    """
    plain = constant(value)
    if plain is not None:
        return plain if np.issubdtype(plain.dtype, np.floating) else None
    dequantize = constant_dequantize(value)
    if dequantize is None:
        return None
    integers, zero_point = _stored(dequantize)
    scale = required_constant(dequantize.inputs[1], "scale")
    axis = dequantize.attributes.get_int("axis", 1)
    kind = np.float64 if integers.itemsize >= 4 else np.float32
    difference = integers.astype(np.int64) - broadcast_along(zero_point, integers.shape, axis)
    real = difference.astype(kind) * broadcast_along(scale, integers.shape, axis)
    for move in _moves(value):
        real = _moved(real, move)
    return real


def check_quantized_constant(dequantize: ir.Node) -> None:
    """Check the quantization parameters of a quantized constant.

    Raises:
        CannotExpress: QuantizeLinear and DequantizeLinear have different ones, there are not as
            many as the axis is long, or a scale is not usable.
    """
    source = dequantize.inputs[0]
    while (node := None if source is None else source.producer()) and node.op_type != "Constant":
        if node.op_type == "QuantizeLinear" and not undoes(dequantize, qparams_of(node)):
            raise CannotExpress(
                "QuantizeLinear and DequantizeLinear of a constant must share scale and zero "
                f"point; {label(node)!r} has others"
            )
        source = node.inputs[0]
    scale, zero_point, _ = qparams_of(dequantize)
    if dequantize.attributes.get_int("block_size", 0):
        return
    shape = dequantize.inputs[0].shape if dequantize.inputs[0] is not None else None
    axis = dequantize.attributes.get_int("axis", 1)
    for what, values in (("scales", scale), ("zero points", zero_point)):
        if shape is not None:
            check_along(values, shape, axis, what)
    if not usable_scale(scale):
        raise CannotExpress(
            f"scales must be positive normal float32; got {first_unusable(scale)!r}"
        )


def _stored(dequantize: ir.Node) -> tuple[Array, Array]:
    """Stored integers and zero point under a DequantizeLinear of a constant.

    A constant that is still float before a QuantizeLinear is quantized here as ONNX defines it:
    ``saturate(rint(x / scale) + zero_point)``.
    """
    zero_point = qparams_of(dequantize).zero_point
    value = dequantize.inputs[0]
    stored = constant(value)
    if stored is not None:
        return stored, zero_point
    node = value.producer() if value is not None else None
    bounds: list[ir.Value | None] = []
    if node is not None and node.op_type == "Clip":
        bounds = [*node.inputs, None, None][1:3]
        inner = node.inputs[0]
        node = inner.producer() if inner is not None else None
    real = constant(node.inputs[0]) if node is not None else None
    if node is None or node.op_type != "QuantizeLinear" or real is None:
        raise CannotExpress("the weight must be constant integers or a quantized constant")
    scale, zero_point, dtype = qparams_of(node)
    if not np.isfinite(real).all():
        raise UnusableValues("the weight must be finite; it holds NaN or infinity")
    axis = node.attributes.get_int("axis", 1)
    # In place and in float32, for weights of 100 MB; where zero points or 32 bits are, in float64.
    wide = np.float64 if dtype.itemsize >= 4 or zero_point.any() else np.float32
    levels: NDArray[Any] = np.asarray(real / broadcast_along(scale, real.shape, axis), wide)
    np.rint(levels, out=levels)
    if zero_point.any():
        levels = levels + broadcast_along(zero_point, real.shape, axis)
    limits = ir.DataType.from_numpy(dtype)
    np.clip(levels, limits.min, limits.max, out=levels)
    for bound, side in zip(bounds, (np.maximum, np.minimum), strict=False):
        if bound is not None:
            side(levels, required_constant(bound, "bound of a Clip"), out=levels)
    return levels.astype(dtype), zero_point


def _followed(value: ir.Value | None) -> Iterator[ir.Node]:
    """As ``followed``, through Reshapes to a constant shape too."""
    for _ in range(MOST_FOLLOWED):
        node = value.producer() if value is not None else None
        reshapes = node is not None and node.op_type == "Reshape" and is_constant(node.inputs[1])
        if node is None or not (reshapes or node.op_type in FOLLOWED):
            return
        yield node
        value = node.inputs[0]


def _moves(value: ir.Value | None) -> list[ir.Node]:
    """The Transposes and Reshapes between the DequantizeLinear and its reader, in their order."""
    return [node for node in _followed(value) if node.op_type in ("Transpose", "Reshape")][::-1]


def _permutation(transpose: ir.Node, rank: int) -> list[int]:
    return list(transpose.attributes.get_ints("perm", range(rank)[::-1]))


def _moved(array: Array, move: ir.Node) -> Array:
    """What a Transpose or Reshape makes of an array."""
    if move.op_type == "Transpose":
        return array.transpose(_permutation(move, array.ndim))
    sizes = required_constant(move.inputs[1], "shape of a Reshape").tolist()
    if not move.attributes.get_int("allowzero", 0):
        sizes = [array.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return array.reshape(sizes)


def _channels(owners: Array, scales: int) -> tuple[int, Array]:
    """The axis that scales run along, and their order, from the number of each value's scale.

    Raises:
        CannotExpress: Scales run along no axis, nor along axis 1 of groups of rows.
    """
    for axis in range(owners.ndim):
        order = owners[tuple(slice(None) if a == axis else slice(1) for a in range(owners.ndim))]
        of_axis = order.size in (1, scales)
        if of_axis and np.array_equal(np.broadcast_to(order, owners.shape), owners):
            return axis, order.reshape(-1)
    if owners.ndim > 1:
        rows = owners.reshape(*owners.shape[:2], -1)
        first = rows[:, :, 0]
        starts = [0, *(np.flatnonzero((first[1:] != first[:-1]).any(1)) + 1)]
        size = len(first) // len(starts)
        even = starts == list(range(0, len(first), size)) and len(first) % len(starts) == 0
        if even and (rows == first[:, :, None]).all():
            return 1, first[starts].reshape(-1)
    raise CannotExpress("its weight's scales must run along the output channels")
