"""The record of a deploy model: what AMCT notes of every quantized layer."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_qat.amct.record import LayerRecord
from lightning_qat_exporters.cann.qdq_graph.types import QuantizedLayer
from lightning_qat_exporters.cann.recurrent_nodes import QuantizedRecurrent


def layer_records(
    layers: Iterable[QuantizedLayer], recurrent: Iterable[QuantizedRecurrent] = ()
) -> tuple[LayerRecord, ...]:
    """The records of what ``find_quantized`` and ``find_recurrent`` found, in graph order."""
    found = [(layer.node, _of_layer(layer)) for layer in layers]
    found += [(layer.node, _of_recurrent(layer)) for layer in recurrent]
    if not found:
        return ()
    graph = found[0][0].graph
    assert graph is not None  # both found it in one
    places = {node: place for place, node in enumerate(graph)}
    return tuple(record for _, record in sorted(found, key=lambda pair: places[pair[0]]))


def _of_layer(layer: QuantizedLayer) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        scale_d=float(layer.scale_d),
        offset_d=layer.offset_d,
        scale_w=tuple(map(float, layer.scale_w)),
        act_type=layer.dst_type,
        wts_type=layer.wts_type,
    )


def _of_recurrent(layer: QuantizedRecurrent) -> LayerRecord:
    return LayerRecord(
        name=layer.name,
        scale_d=float(layer.x.scale_d),
        offset_d=layer.x.offset_d,
        scale_w=tuple(map(float, layer.scale_w)),
        scale_h=float(layer.h.scale_d),
        offset_h=layer.h.offset_d,
        scale_r=tuple(map(float, layer.scale_r)),
    )
