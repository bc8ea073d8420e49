"""Q/DQ pairs of activations, gathered by tensor and quantization parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import CannotExpress
from lightning_qat_exporters.cann.qdq_graph.constants import required_constant
from lightning_qat_exporters.cann.qdq_graph.names import label, reader_label
from lightning_qat_exporters.cann.qdq_graph.qparams import qparams_of, undoes, usable_scale
from lightning_qat_exporters.cann.qdq_graph.types import (
    REAL_TYPES,
    DstType,
    QuantizedActivation,
    type_range,
)
from lightning_qat_exporters.onnx_files.graph_writer import Names

# Unsigned integers are signed ones shifted by half their number.
_TYPES: Mapping[np.dtype[Any], tuple[DstType, int]] = {
    np.dtype(np.int8): ("INT8", 0),
    np.dtype(np.uint8): ("INT8", 128),
    np.dtype(np.int16): ("INT16", 0),
    np.dtype(np.uint16): ("INT16", 32768),
}


@dataclass(eq=False)
class PairGroup:
    """A ``QuantizedActivation`` while its pairs are being collected; it has no name yet."""

    source: ir.Value
    scale: np.float32
    offset: int
    dst_type: DstType
    low: int
    high: int
    real: ir.DataType
    quantizes: list[ir.Node]
    dequantizes: list[ir.Node]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for pairs that belong to one group."""
        return (
            *(id(self.source), self.scale.tobytes(), self.offset),
            *(self.dst_type, self.low, self.high, self.real),
        )


def named_activations(
    groups: Iterable[PairGroup], first_layer: Mapping[PairGroup, str]
) -> dict[PairGroup, QuantizedActivation]:
    """The finished activation of every group.

    Args:
        groups: All groups, in graph order.
        first_layer: Name of the first layer that reads a group, where one does.
    """
    names = Names()
    return {
        group: QuantizedActivation(
            name=names.take(
                first_layer.get(group) or reader_label(group.quantizes, group.dequantizes)
            ),
            source=group.source,
            scale_d=group.scale,
            offset_d=group.offset,
            dst_type=group.dst_type,
            low=group.low,
            high=group.high,
            real=group.real,
            quantizes=tuple(group.quantizes),
            dequantizes=tuple(group.dequantizes),
        )
        for group in groups
    }


def quantize_before(dequantize: ir.Node) -> ir.Node | None:
    """The QuantizeLinear whose integers a DequantizeLinear reads, through a Clip."""
    value = dequantize.inputs[0]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Clip":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def read_pair(quantize: ir.Node) -> PairGroup:
    """Read one QuantizeLinear of an activation, its Clip and its DequantizeLinear nodes.

    Raises:
        CannotExpress: Several scales, other readers, or types that an activation cannot have.
    """
    qparams = qparams_of(quantize)
    scale, zero_point, dtype = qparams
    if scale.size != 1 or zero_point.size != 1:
        raise CannotExpress(
            f"an activation must have one scale and one zero point; got {scale.size} scales and "
            f"{zero_point.size} zero points",
            "Quantize activations per tensor",
        )
    if dtype not in _TYPES:
        raise CannotExpress(
            f"activations must be int8, uint8, int16 or uint16; got {dtype}",
            "Quantize the activation with 8-bit integers"
            + (
                " instead of FP8 (ModelOpt: mtq.INT8_DEFAULT_CFG)" if "float8" in str(dtype) else ""
            ),
        )
    step = np.float32(scale.reshape(()))
    if not usable_scale(step):
        raise CannotExpress(
            f"a scale must be positive, and it and its reciprocal normal float32; got {step!r}",
            "Calibrate the tensor again, or leave it real",
        )
    real = ir.DataType.from_numpy(scale.dtype)
    if real not in REAL_TYPES:
        raise CannotExpress(
            f"the tensor must be float32 or float16; its scale is {real.name}",
            "Convert the model to one of the two",
        )
    dst_type, shift = _TYPES[dtype]
    source = quantize.inputs[0]
    assert source is not None  # QuantizeLinear's first input is not optional
    integers, low, high = _clipped(quantize.outputs[0], shift, *type_range(dst_type))
    dequantizes = list(integers.consumers())
    for node in dequantizes:
        if node.op_type != "DequantizeLinear":
            raise CannotExpress(f"its integers are read by {label(node)!r} ({node.op_type})")
        if not undoes(node, qparams):
            raise CannotExpress(
                f"QuantizeLinear and DequantizeLinear of a pair must share scale and zero point; "
                f"{label(node)!r} has others"
            )
    return PairGroup(
        source=source,
        scale=step,
        offset=int(zero_point.reshape(())) - shift,
        dst_type=dst_type,
        low=low,
        high=high,
        real=real,
        quantizes=[quantize],
        dequantizes=dequantizes,
    )


def _clipped(integers: ir.Value, shift: int, low: int, high: int) -> tuple[ir.Value, int, int]:
    """The integers after their Clip, if they have one, and the range that is left."""
    clips = [n for n in integers.consumers() if n.op_type == "Clip"]
    if not clips:
        return integers, low, high
    if len(integers.consumers()) > 1 or integers.is_graph_output():
        raise CannotExpress("the integers must be read either by one Clip or by DequantizeLinear")
    bounds = [
        None if value is None else int(required_constant(value, "bound of a Clip").reshape(()))
        for value in [*clips[0].inputs, None, None][1:3]
    ]
    low = low if bounds[0] is None else max(low, bounds[0] - shift)
    high = high if bounds[1] is None else min(high, bounds[1] - shift)
    return clips[0].outputs[0], low, high
