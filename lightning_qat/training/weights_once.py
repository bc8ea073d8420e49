"""Quantize each weight once for several forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache


def use_weight_cache(model: nn.Module, cache: QuantizedWeightCache | None) -> None:
    """Keep the quantized weights of a model in a cache for further forwards; ``None``: do not."""
    switch(model, cache=cache)


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for all forwards inside, unless an operation changes it.

    For gradient accumulation and evaluation in a loop of one's own; ``QATCallback`` does so by
    itself. Weights must not be changed through ``.data`` inside.

        >>> import torch
        >>> from lightning_qat import prepare
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare(model, {"joins": False, "outputs": False})
        >>> with weights_quantized_once(model):
        ...     for x in torch.ones(3, 5, 4):
        ...         model(x).sum().backward()
    """
    cache = QuantizedWeightCache()
    cache.open = True
    use_weight_cache(model, cache)
    try:
        yield
    finally:
        use_weight_cache(model, None)
