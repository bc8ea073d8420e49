"""Weights of few bits with larger integers, so that biases are rounded to finer steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from lightning_qat.ir.finer_biases import finer_by
from lightning_qat_exporters.cann.qdq_graph.types import IntegerLayer, QuantizedGraph


def with_finer_layers(found: QuantizedGraph) -> QuantizedGraph:
    """Weights of few bits with larger integers and smaller scales: the same values, to the bit.

    As ``lightning_qat.ir.finer_biases`` does with a model of ours. Packed weights stay as they are.
    """
    return replace(found, layers=tuple(map(_finer, found.layers)))


def _finer(layer: IntegerLayer) -> IntegerLayer:
    if layer.bias is None or layer.add is not None or layer.wts_type == "INT4":
        return layer
    integers = int(np.abs(layer.weight.astype(np.int16)).max(initial=0))
    smallest = min(float(layer.scale_w.min()), float(layer.accumulator_scale.min()))
    factor = finer_by(integers, most_steps(layer), smallest)
    if factor == 1:
        return layer
    return replace(
        layer, weight=layer.weight * np.int8(factor), scale_w=layer.scale_w / np.float32(factor)
    )


def most_steps(layer: IntegerLayer) -> float:
    """The largest value of a bias in steps of the accumulator."""
    if layer.bias is None or layer.add is not None:
        return 0.0
    return float(np.max(np.abs(layer.bias) / layer.accumulator_scale, initial=0.0))
