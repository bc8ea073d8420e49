"""Products of integers in ONNX Runtime's float32 operators, exact.

A sum of integers is exact in float32, in any order, while no partial sum can reach 2**24. Where
one can, by a layer's weights and the range of its data, the data is split into digits with which
none can, ``x = d0 + base * d1 + base**2 * d2``, and their products are put together in integers.
Where a channel's weights alone sum to too much for that, they are split into digits as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.standard_operators.node_writer import NodeWriter
from lightning_qat_exporters.cann.standard_operators.quantize_nodes import Centered
from lightning_qat_exporters.onnx_files.graph_writer import array_of

_EXACT = 2**24
_INT32 = np.iinfo(np.int32)
_INPUT_AXIS = {"Conv": 1, "ConvTranspose": 0, "Gemm": 0, "MatMul": 0}
_OUTPUT_AXIS = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def channel_axis(node: ir.Node) -> int:
    """The channel's axis of an accumulator, counted from the end."""
    weight = array_of(node.inputs[1])
    convolution = node.op_type in ("Conv", "ConvTranspose")
    return 1 - weight.ndim if convolution and weight is not None else -1


def write_layer(write: NodeWriter, node: ir.Node, data: Centered, channels: int | None) -> ir.Value:
    """The accumulator of an integer layer: int32, or int64 where that may not hold it.

    Args:
        write: For this node.
        node: Conv, ConvTranspose, Gemm or MatMul.
        data: What it reads.
        channels: Input channels of the data, where they are known; a weight with half as many holds
            two of 4 bits in a byte.

    Raises:
        CannotExpress: Weight or bias are no integer constants, or the node has factors.
    """
    weight, bias = _weight(node), _bias(node)
    axis = _INPUT_AXIS[node.op_type]
    if channels == 2 * weight.shape[axis] and node.attributes.get_int("group", 1) == 1:
        weight = unpacked(weight, axis)

    def product(x: ir.Value, w: ir.Value) -> ir.Value:
        if node.op_type in ("Gemm", "MatMul"):
            return write("MatMul", x, w)
        return write(node.op_type, x, w, **_attributes(node))

    if bias is not None:
        bias = bias.reshape(-1, *[1] * (-1 - channel_axis(node)))
    return write_product(write, data, weight, bias, _OUTPUT_AXIS[node.op_type], product)


def unpacked(weight: Array, axis: int) -> Array:
    """Weights of 4 bits, two to a byte along ``axis``, the first in the low half."""
    halves = np.stack((weight << 4 >> 4, weight >> 4), axis + 1)
    return halves.reshape(*weight.shape[:axis], -1, *weight.shape[axis + 1 :])


def write_product(
    write: NodeWriter,
    data: Centered,
    weight: Array,
    bias: Array | None,
    output_axis: int,
    product: Callable[[ir.Value, ir.Value], ir.Value],
) -> ir.Value:
    """An exact ``product(data, weight) + bias`` of integers, as int32 or int64.

    Args:
        write: For the node that it is part of.
        data: The data.
        weight: Integers.
        bias: Integers that broadcast over the product, or None.
        output_axis: The weight's axis that is not summed over.
        product: Writes the linear operator, from data and weight in float32.

    Raises:
        CannotExpress: A channel has 2**23 weights or more.
    """
    parts = _weight_digits(weight, output_axis)
    reach = sum(place * sums.reach(data.lowest, data.highest) for _, place, sums in parts)
    added = 0 if bias is None else int(np.abs(bias, dtype=np.int64).max(initial=0))
    # The digits' own products may be twice as large as their sum.
    fits = 2 * reach + added <= _INT32.max
    kind = ir.DataType.INT32 if fits else ir.DataType.INT64
    integer = kind.numpy().type
    total: ir.Value | None = None
    for part, weight_place, sums in parts:
        real_weight = write.cast(part, ir.DataType.FLOAT)
        for digit, place in _data_digits(write, data, sums):
            term = write.cast(product(digit, real_weight), kind)
            if place * weight_place > 1:
                term = write("Mul", term, integer(place * weight_place), dtype=kind)
            total = term if total is None else write("Add", total, term, dtype=kind)
    assert total is not None  # there is one digit at least
    if bias is not None:
        total = write("Add", total, bias.astype(integer), dtype=kind)
    if not fits and not data.wide:
        below = write("Less", total, integer(_INT32.min), dtype=ir.DataType.BOOL)
        above = write("Greater", total, integer(_INT32.max), dtype=ir.DataType.BOOL)
        write.raise_where(
            write("Or", below, above, dtype=ir.DataType.BOOL),
            f"The accumulator of {write.label!r} must fit int32; here it does not.",
        )
    return total


class _Sums:
    """Sums of a channel's positive and negative weights, which bound every partial sum."""

    def __init__(self, weight: Array, output_axis: int) -> None:
        wide = np.moveaxis(weight, output_axis, 0).reshape(weight.shape[output_axis], -1)
        self._above = np.maximum(wide, 0).sum(1, dtype=np.int64)
        self._below = np.minimum(wide, 0).sum(1, dtype=np.int64)

    def reach(self, lowest: int, highest: int) -> int:
        """The largest magnitude of a sum of products with data from ``lowest`` to ``highest``."""
        above = highest * self._above + lowest * self._below
        below = lowest * self._above + highest * self._below
        return int(max(above.max(initial=0), -below.min(initial=0)))


def _weight_digits(weight: Array, output_axis: int) -> list[tuple[Array, int, _Sums]]:
    """Digits of int8 weights that sum to less than 2**23 in a channel, and what each counts."""
    for bits in (8, 4, 2, 1):
        places = range(0, 8 - bits, bits)
        digits = [(weight >> place & (1 << bits) - 1, 1 << place) for place in places]
        digits.append((weight >> 8 - bits, 1 << 8 - bits))  # with the sign
        parts = [(digit, place, _Sums(digit, output_axis)) for digit, place in digits]
        if all(2 * sums.reach(0, 1) < _EXACT for *_, sums in parts):
            return parts
    count = weight.size // weight.shape[output_axis]
    raise CannotExpress(
        f"a channel must have fewer than {_EXACT // 2} weights for exact sums in float32; got "
        f"{count}"
    )


def _data_digits(write: NodeWriter, data: Centered, sums: _Sums) -> list[tuple[ir.Value, int]]:
    """Values whose products with the weights are exact, and what each counts."""
    base = 1
    while base < _EXACT and sums.reach(0, 2 * base) < _EXACT:
        base *= 2
    value, lowest, highest, place = data.value, data.lowest, data.highest, 1
    digits = []
    while sums.reach(lowest, highest) >= _EXACT:
        high = write("Floor", write("Mul", value, np.float32(1 / base)))
        digits.append((write("Sub", value, write("Mul", high, np.float32(base))), place))
        value, lowest, highest, place = high, lowest // base, highest // base, place * base
    return [*digits, (value, place)]


def _weight(node: ir.Node) -> Array:
    weight = array_of(node.inputs[1])
    if weight is None or weight.dtype != np.int8:
        got = "none" if weight is None else str(weight.dtype)
        raise CannotExpress(f"data of an AscendQuant needs a constant int8 weight; got {got}")
    if node.op_type != "Gemm":
        return weight
    of = node.attributes
    factors = of.get_float("alpha", 1.0), of.get_float("beta", 1.0), of.get_int("transA", 0)
    if factors != (1.0, 1.0, 0):
        raise CannotExpress(
            "an integer Gemm must have alpha = beta = 1 and transA = 0; got alpha, beta, transA = "
            f"{factors}"
        )
    return weight.T if of.get_int("transB", 0) else weight


def _bias(node: ir.Node) -> Array | None:
    given = node.inputs[2] if len(node.inputs) > 2 else None
    bias = array_of(given)
    if given is not None and (bias is None or bias.dtype != np.int32):
        got = "none" if bias is None else str(bias.dtype)
        raise CannotExpress(f"an integer layer needs a constant int32 bias; got {got}")
    return bias


def _attributes(node: ir.Node) -> dict[str, Any]:
    values = ((name, attribute.value) for name, attribute in node.attributes.items())
    return {name: v if isinstance(v, int | str) else list(v) for name, v in values}
