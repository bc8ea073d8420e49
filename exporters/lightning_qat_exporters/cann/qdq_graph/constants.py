"""Constants of a graph, and the integers of quantized weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.types import (
    INT8,
    VALUE_PRESERVING,
    Array,
    GridOf,
    LayerWeight,
    Mismatch,
    Unfit,
)


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``constant`` has an array for ``value``; computes none."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in VALUE_PRESERVING:
            return False
        value = node.inputs[0]
    return value is not None


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node, also cast and transposed; else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return np.asarray(tensor.numpy())
    node = None if value is None else value.producer()
    if node is None or node.op_type not in VALUE_PRESERVING:
        return None
    array = constant(node.inputs[0])
    if array is None or node.op_type == "Identity":
        return array
    if node.op_type == "Cast":
        return array.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())
    return array.transpose(node.attributes.get_ints("perm", range(array.ndim)[::-1]))


def real_constant(value: ir.Value | None) -> Array | None:
    """The real values of a constant that may be stored as integers and a DequantizeLinear.

    ``(q - zero_point) * scale`` as ONNX ``DequantizeLinear`` defines it. A quantized 32-bit
    integer is multiplied in float64, where the product is exact.

    Returns:
        Float values in the constant's own layout, or None where ``value`` is no such constant.
    """
    plain = constant(value)
    if plain is not None:
        return plain if np.issubdtype(plain.dtype, np.floating) else None
    dequantize = weight_dequantize(value)
    if dequantize is None:
        return None
    integers, zero_point = integers_of(dequantize)
    scale = array_of(dequantize.inputs[1], "scale")
    axis = dequantize.attributes.get_int("axis", 1)
    kind = np.float64 if integers.itemsize >= 4 else np.float32
    difference = integers.astype(np.int64) - scales_along(zero_point, integers.ndim, axis)
    real = difference.astype(kind) * scales_along(scale, integers.ndim, axis)
    for perm in permutations(value, real.ndim):
        real = real.transpose(perm)
    return real


def array_of(value: ir.Value | None, what: str) -> Array:
    array = constant(value)
    if array is None:
        raise Mismatch(f"the {what} must be a constant")
    return array


def scales_along(array: Array, rank: int, axis: int) -> Array:
    """A per-tensor or per-axis parameter in a shape that broadcasts against a tensor."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis] = array.size
    return array.reshape(shape)


def factors_of(node: ir.Node) -> tuple[Array, Array, np.dtype[Any]]:
    """Scale, zero point and integer type of a QuantizeLinear or DequantizeLinear."""
    scale = array_of(node.inputs[1], "scale").reshape(-1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = array_of(node.inputs[2], "zero point")
        return scale, zero_point.reshape(-1).astype(np.int64), zero_point.dtype
    kind = node.attributes.get_int("output_dtype", 0)
    # ONNX QuantizeLinear: without zero point and output_dtype the integers are uint8.
    dtype = ir.DataType(kind).numpy() if kind else np.dtype(np.uint8)
    return scale, np.zeros(1, np.int64), dtype


def same_factors(
    factors: tuple[Array, Array, np.dtype[Any]],
    other: tuple[Array, Array, np.dtype[Any]],
    *,
    typed: bool,
) -> bool:
    """Whether a DequantizeLinear undoes a QuantizeLinear; without zero point it has no type."""
    same = np.array_equal(factors[0], other[0]) and np.array_equal(factors[1], other[1])
    return same and (not typed or factors[2] == other[2])


def require_usable(weight: LayerWeight, grid: GridOf) -> None:
    """Raise ``Unfit`` for integers and scales that no integer layer can have."""
    integers, scale = weight.integers, weight.scale
    if integers.size and not (INT8.min <= integers.min() and integers.max() <= INT8.max):
        raise Unfit(
            f"the weight's integers must fit int8; they run from {integers.min()} to "
            f"{integers.max()}",
            "Quantize the weight with 8 bits or fewer",
        )
    product = grid.scale * scale
    for what, values in (("the weight's scales", scale), ("scale_d * scale_w", product)):
        if not usable_scale(values):
            bad = values[~is_usable(values)][0]
            raise Unfit(
                f"{what} must be positive normal float32; got {bad!r}",
                "Quantize the layer again, or leave it real",
            )


def usable_scale(scale: Array | np.float32) -> bool:
    """Whether every scale and its reciprocal are positive normal float32 numbers.

    >>> usable_scale(np.float32(0.5)), usable_scale(np.float32(1e-39))
    (True, False)
    """
    return bool(np.all(is_usable(scale)))


def is_usable(scale: Array | np.float32) -> Array:
    smallest = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        reciprocal = np.float32(1) / np.float32(scale)
    usable: Array = np.isfinite(scale) & (scale >= smallest) & (reciprocal >= smallest)
    return usable


def weight_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant behind ``value``, through Transpose and Identity."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in VALUE_PRESERVING:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    value = node.inputs[0]
    inner = value.producer() if value is not None else None
    while inner is not None and inner.op_type in ("Clip", "QuantizeLinear"):
        value = inner.inputs[0]
        inner = value.producer() if value is not None else None
    return node if is_constant(value) else None


def check_constant(dequantize: ir.Node) -> None:
    """Raise ``Mismatch`` where the factors of a quantized constant cannot be meant."""
    source = dequantize.inputs[0]
    while (node := None if source is None else source.producer()) and node.op_type != "Constant":
        if node.op_type == "QuantizeLinear":
            scale, zero_point, dtype = factors_of(node)
            other = factors_of(dequantize)
            typed = len(dequantize.inputs) > 2
            if not same_factors((scale, zero_point, dtype), other, typed=typed):
                raise Mismatch(
                    "QuantizeLinear and DequantizeLinear of a constant must share scale and zero "
                    f"point; {label(node)!r} has others"
                )
        source = node.inputs[0]
    scale, zero_point, _ = factors_of(dequantize)
    if dequantize.attributes.get_int("block_size", 0):
        return
    shape = dequantize.inputs[0].shape if dequantize.inputs[0] is not None else None
    axis = dequantize.attributes.get_int("axis", 1)
    for what, factors in (("scales", scale), ("zero points", zero_point)):
        if factors.size > 1 and shape is not None and not runs_along(factors, shape, axis):
            raise Mismatch(
                f"a constant of shape {list(shape)} must have one scale and zero point, or as many "
                f"as its axis {axis} is long; got {factors.size} {what}"
            )
    if not usable_scale(scale):
        bad = scale[~is_usable(scale)][0]
        raise Mismatch(f"scales must be positive normal float32; got {bad!r}")


def runs_along(factors: Array, shape: ir.Shape, axis: int) -> bool:
    known = -len(shape) <= axis < len(shape)
    return known and (not isinstance(shape[axis], int) or shape[axis] == factors.size)


def integers_of(dequantize: ir.Node) -> tuple[Array, Array]:
    """Stored integers and zero point under a DequantizeLinear of a constant.

    A constant that is still float before a QuantizeLinear is quantized here as ONNX defines it:
    ``saturate(rint(x / scale) + zero_point)``.
    """
    zero_point = factors_of(dequantize)[1]
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
        raise Mismatch("the weight must be constant integers or a quantized constant")
    scale, zero_point, dtype = factors_of(node)
    if not np.isfinite(real).all():
        raise Unfit("the weight must be finite; it holds NaN or infinity")
    axis = node.attributes.get_int("axis", 1)
    levels = np.rint(real / scales_along(scale, real.ndim, axis))
    limits = ir.DataType.from_numpy(dtype)
    levels = np.clip(levels + scales_along(zero_point, real.ndim, axis), limits.min, limits.max)
    for bound, side in zip(bounds, (np.maximum, np.minimum), strict=False):
        if bound is not None:
            levels = side(levels, array_of(bound, "bound of a Clip"))
    return levels.astype(np.int64).astype(dtype), zero_point


class Stored(NamedTuple):
    """Integers around zero of a quantized constant, their scale or scales, and the scales' axis."""

    integers: Array
    scale: NDArray[np.float32]
    axis: int
    dtype: np.dtype[Any]


def stored_integers(value: ir.Value | None) -> Stored:
    """The integers of a quantized constant, also transposed, its zero point taken off.

    Raises:
        Mismatch: Its scales are of blocks, or it is no constant.
    """
    dequantize = weight_dequantize(value)
    if dequantize is None:
        raise Mismatch("its weight is no quantized constant")
    stored, zero_point = integers_of(dequantize)
    scale = array_of(dequantize.inputs[1], "scale").astype(np.float32)
    if scale.ndim > 1 or dequantize.attributes.get_int("block_size", 0) > 0:
        raise Mismatch("its weight has one scale per block; use one per tensor or per channel")
    axis: int = dequantize.attributes.get_int("axis", 1) % max(stored.ndim, 1)
    integers = stored
    if zero_point.any():
        wide = np.int16 if stored.dtype.itemsize == 1 else np.int64
        integers = stored.astype(wide) - scales_along(zero_point, stored.ndim, axis).astype(wide)
    for perm in permutations(value, integers.ndim):
        integers, axis = integers.transpose(perm), perm.index(axis)
    return Stored(integers, scale.reshape(-1), axis, stored.dtype)


def permutations(value: ir.Value | None, rank: int) -> list[list[int]]:
    """The Transposes between the DequantizeLinear and its reader, first applied first."""
    perms: list[list[int]] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in VALUE_PRESERVING:
        if node.op_type == "Transpose":
            perms.append(list(node.attributes.get_ints("perm", range(rank)[::-1])))
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return perms[::-1]
