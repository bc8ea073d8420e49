"""AMCT's record of a deploy model: the quantization parameters of every layer."""

from __future__ import annotations

from lightning_qat.amct.layer_record import LayerRecord
from lightning_qat_exporters.cann.qdq_graph.types import (
    IntegerLayer,
    IntegerRecurrent,
    QuantizedGraph,
)


def layer_records(found: QuantizedGraph) -> tuple[LayerRecord, ...]:
    """A record for every integer layer and device node, in graph order."""
    records = {layer.node: _of_layer(layer) for layer in found.layers}
    records |= {layer.node: _of_recurrent(layer) for layer in found.recurrent}
    return tuple(records[node] for node in found.model.graph if node in records)


def _of_layer(layer: IntegerLayer) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        scale_d=float(layer.activation.scale_d),
        offset_d=layer.activation.offset_d,
        scale_w=tuple(map(float, layer.scale_w)),
        act_type=layer.activation.dst_type,
        wts_type=layer.wts_type,
    )


def _of_recurrent(layer: IntegerRecurrent) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        scale_d=float(layer.x.scale_d),
        offset_d=layer.x.offset_d,
        scale_w=tuple(map(float, layer.scale_w)),
        scale_h=float(layer.h.scale_d),
        offset_h=layer.h.offset_d,
        scale_r=tuple(map(float, layer.scale_r)),
        wts_type=layer.wts_type,
    )
