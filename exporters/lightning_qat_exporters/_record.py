"""The record of a deploy model: what AMCT notes of every quantized layer."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_qat.record import LayerRecord
from lightning_qat_exporters._quantized_ops import QuantizedLayer


def layer_records(layers: Iterable[QuantizedLayer]) -> tuple[LayerRecord, ...]:
    """The records of the layers that ``find_quantized`` found."""
    return tuple(
        LayerRecord(
            name=layer.name,
            scale_d=float(layer.scale_d),
            offset_d=layer.offset_d,
            scale_w=tuple(map(float, layer.scale_w)),
            act_type=layer.dst_type,
            wts_type=layer.wts_type,
        )
        for layer in layers
    )
