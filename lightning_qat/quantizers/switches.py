"""The switches of quantizers, and the two functions that set them for a model.

Each quantizer holds its own switches as plain attributes, as in torch.ao and ModelOpt. An object
that all quantizers of a model share would be set once per phase, but a single quantizer could not
be switched off (to measure what it costs), a module of two models would have to choose one of them,
and a forward would look up every switch twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lightning_qat.quantizers.base import Quantizer


def switch(quantizers: nn.Module | Iterable[nn.Module], **switches: object) -> None:
    """Set switches of many quantizers; each takes those that it has.

    Args:
        quantizers: A model, of which every quantizer is meant, or modules.
        switches: Name (see ``Quantizer.SWITCHES``) to value.
    """
    if isinstance(quantizers, nn.Module):
        quantizers = quantizers.modules()
    for quantizer in quantizers:
        if isinstance(quantizer, Quantizer):
            for name in quantizer.SWITCHES & switches.keys():
                setattr(quantizer, name, switches[name])


def switch_like(quantizer: Quantizer, other: Quantizer) -> None:
    """Give a new quantizer the switches of one that the model has already."""
    switch([quantizer], **other.switches())
