"""Layers that share a weight share its quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_qat.layers import QATLayer
from lightning_qat.quantizers.names import weight_quantizer_name
from lightning_qat.quantizers.weight import WeightQuantizer


def share_quantizers(layers: Iterable[nn.Module]) -> None:
    """Give the weight of several layers one quantizer, where all of them would round it alike.

    An embedding and the output layer that is tied to it have the same rows, and so the same
    channels. Layers that quantize a shared weight to different grids keep a quantizer each.

    Args:
        layers: QAT layers, changed in place.
    """
    first: dict[Any, WeightQuantizer] = {}
    for layer in layers:
        assert isinstance(layer, QATLayer)
        for name in layer.weight_names(layer):
            child = weight_quantizer_name(name)
            weight, quantizer = getattr(layer, name), getattr(layer, child)
            if not isinstance(weight, nn.Parameter) or not isinstance(quantizer, WeightQuantizer):
                continue
            alike = id(weight), quantizer.spec, quantizer.axis, quantizer.groups
            shared = first.setdefault(alike, quantizer)
            if shared is not quantizer:
                shared.shared = True
                setattr(layer, child, shared)
