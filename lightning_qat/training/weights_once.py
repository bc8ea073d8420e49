"""Quantize each weight once for several forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.quantizers.weight_cache import QuantizedWeightCache


def use_weight_cache(model: nn.Module, kept: QuantizedWeightCache | None) -> None:
    """Where the quantized weights of a model are kept for further forwards; ``None``: nowhere."""
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.kept = kept


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once for all forwards inside, unless an operation changes it.

    For gradient accumulation and evaluation in a loop of one's own; ``QATCallback`` does so by
    itself. Weights must not be changed through ``.data`` inside.

        >>> from lightning_qat import prepare
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare(model, {"joins": False, "outputs": False})
        >>> with weights_quantized_once(model):
        ...     for x in torch.ones(3, 5, 4):
        ...         model(x).sum().backward()
    """
    kept = QuantizedWeightCache()
    kept.open = True
    use_weight_cache(model, kept)
    try:
        yield
    finally:
        use_weight_cache(model, None)
