"""Learned scales follow weights that outgrow them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_qat.layers.quantized_weights import QuantizedWeight, quantized_weights
from lightning_qat.quantizers.learned_weight import LearnedWeightQuantizer, widen_outgrown


def learned_weights(model: nn.Module) -> list[QuantizedWeight]:
    """The weights whose scales are learned, but for those that are computed in each forward.

    Computing a weight may change what it is computed from, as spectral norm does.
    """
    return [
        one
        for one in quantized_weights(model)
        if isinstance(one.quantizer, LearnedWeightQuantizer)
        and not is_parametrized(one.layer, one.name)
    ]


def follow_weights(weights: Iterable[QuantizedWeight]) -> None:
    """Widen learned scales that their weights have outgrown, between a step and the next forward.

    On a CPU forwards do so themselves, but for those that ``torch.compile`` has compiled. Else the
    callback and a loop of one's own call this after each step. All processes find the same, for
    they have the same weights.
    """
    widen_outgrown(
        (one.quantizer, one.weight)
        for one in weights
        if isinstance(one.quantizer, LearnedWeightQuantizer)
    )
