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
    if layer.bias_steps is None or layer.wts_type == "INT4":
        return layer
    largest = max(int(layer.weight.max(initial=0)), -int(layer.weight.min(initial=0)))
    scales = np.concatenate((layer.scale_w, layer.accumulator_scale))
    factor = finer_by(largest, most_steps(layer), float(scales.min(initial=np.inf)))
    if factor == 1:
        return layer
    return replace(
        layer, weight=layer.weight * np.int8(factor), scale_w=layer.scale_w / np.float32(factor)
    )


def most_steps(layer: IntegerLayer) -> float:
    """The largest value of a bias in steps of the accumulator."""
    steps = layer.bias_steps
    return 0.0 if steps is None else float(np.abs(steps).max(initial=0.0))
