"""AscendQuant, AscendDequant and AscendAntiQuant as standard operators, in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.standard_operators.node_writer import NodeWriter
from lightning_qat_exporters.onnx_files.graph_writer import array_of

_Key = TypeVar("_Key")
_Known = TypeVar("_Known")

_STORED = {"INT8": ir.DataType.INT8, "INT16": ir.DataType.INT16}
_ROUND_MODES = ("Round", "Floor", "Ceil", "Trunc")
"""All but the last are ONNX's operators of that name."""
_REAL = {0: ir.DataType.FLOAT, 1: ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Centered:
    """Integers less their offset, as float32: real zero is 0.

    Args:
        value: The integers.
        lowest: The smallest that they can be, 0 or less.
        highest: The largest.
        wide: They are of 16 bits.
    """

    value: ir.Value
    lowest: int
    highest: int
    wide: bool


def write_quant(write: NodeWriter, node: ir.Node) -> tuple[ir.Value, Centered]:
    """``clip(round(x * scale) + offset)``; ``sqrt_mode`` multiplies by ``scale`` twice.

    Returns:
        The integers as stored, and as a layer reads them.

    Raises:
        CannotExpress: An attribute has a value that is not defined here.
    """
    attributes = node.attributes
    stored = _one_of(attributes.get_string("dst_type", "INT8"), "dst_type", _STORED)
    mode = attributes.get_string("round_mode", "Round")
    if mode not in _ROUND_MODES:
        raise CannotExpress(f"round_mode must be one of {list(_ROUND_MODES)}; got {mode!r}")
    scale, offset = _factors(node)
    x = node.inputs[0]
    assert x is not None
    if x.dtype != ir.DataType.FLOAT:
        x = write.cast(x, ir.DataType.FLOAT)
    write.raise_where(
        write("IsNaN", x, dtype=ir.DataType.BOOL),
        f"{write.label!r} cannot quantize NaN; its input holds some.",
    )
    for _ in range(1 + attributes.get_int("sqrt_mode", 0)):
        x = write("Mul", x, scale)
    if mode == "Trunc":
        steps = write("Mul", write("Sign", x), write("Floor", write("Abs", x)))
    else:
        steps = write(mode, x)
    return write_levels(write, steps, offset, stored)


def write_levels(
    write: NodeWriter, steps: ir.Value, offset: float, stored: ir.DataType
) -> tuple[ir.Value, Centered]:
    """Saturate whole numbers of steps to ``stored``, around an offset; returns as above."""
    if offset != np.rint(offset):
        raise CannotExpress(f"the offset must be a whole number; got {offset:g}")
    limits = np.iinfo(stored.numpy())
    shift = np.float32(offset)
    levels = write("Add", steps, shift) if offset else steps
    levels = write("Clip", levels, np.float32(limits.min), np.float32(limits.max))
    centered = write("Sub", levels, shift) if offset else levels
    lowest, highest = (int(limit - offset) for limit in (limits.min, limits.max))
    wide = stored is ir.DataType.INT16
    return write.cast(levels, stored), Centered(centered, min(lowest, 0), max(highest, 0), wide)


def write_antiquant(write: NodeWriter, node: ir.Node) -> ir.Value:
    """``(q - offset) * scale``; ``sqrt_mode`` multiplies by ``scale`` twice.

    Raises:
        CannotExpress: As above.
    """
    scale, offset = _factors(node)
    q = node.inputs[0]
    assert q is not None
    real = write("Sub", write.cast(q, ir.DataType.FLOAT), np.float32(offset))
    return _real(write, node, real, scale)


def write_dequant(write: NodeWriter, node: ir.Node, channel_axis: int | None) -> ir.Value:
    """``float32(accumulator) * scale``; the scale is in the low 32 bits of the parameter.

    Args:
        write: For this node.
        node: The AscendDequant.
        channel_axis: Of the accumulator, counted from the end; None where no layer made it.

    Raises:
        CannotExpress: No layer feeds it, or the parameter has more than a float32 in it.
    """
    accumulator, param = node.inputs[0], array_of(node.inputs[1])
    assert accumulator is not None
    if channel_axis is None:
        raise CannotExpress(
            "it must read the accumulator of Conv, ConvTranspose, Gemm or MatMul; it reads "
            f"{accumulator.name!r}"
        )
    bits = None if param is None else param.astype(np.uint64).reshape(-1)
    if bits is None or (bits >> np.uint64(32)).any():
        raise CannotExpress(
            "its parameter must be a constant with a float32 in the low 32 bits and zeros in the "
            f"high ones; got {'none' if bits is None else f'{int(bits.max()):#x}'}"
        )
    scale = bits.astype(np.uint32).view(np.float32)
    if scale.size > 1:
        scale = scale.reshape(-1, *[1] * (-1 - channel_axis))
    real = write.cast(accumulator, ir.DataType.FLOAT)
    return _real(write, node, real, scale)


def _real(write: NodeWriter, node: ir.Node, real: ir.Value, scale: Array | np.generic) -> ir.Value:
    """What makes integers real, with the attributes that AntiQuant and Dequant share."""
    dtype = _one_of(node.attributes.get_int("dtype", 0), "dtype", _REAL)
    for _ in range(1 + node.attributes.get_int("sqrt_mode", 0)):
        real = write("Mul", real, scale)
    if node.attributes.get_int("relu_flag", 0):
        real = write("Relu", real)
    return real if dtype is ir.DataType.FLOAT else write.cast(real, dtype)


def _factors(node: ir.Node) -> tuple[np.float32, float]:
    if "scale" not in node.attributes:
        raise CannotExpress("it must have a scale; without one ATC reads 0")
    return (
        np.float32(node.attributes.get_float("scale")),
        node.attributes.get_float("offset", 0.0),
    )


def _one_of(value: _Key, attribute: str, known: Mapping[_Key, _Known]) -> _Known:
    if value not in known:
        raise CannotExpress(f"{attribute} must be one of {list(known)}; got {value!r}")
    return known[value]
