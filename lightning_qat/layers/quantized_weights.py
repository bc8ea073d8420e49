"""The weights of a model's layers that have a quantizer: one walk for all who look at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from lightning_qat.layers._layer import QATLayer
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.quantizers.names import weight_quantizer_name
from lightning_qat.quantizers.weight import WeightQuantizer


class QuantizedWeight(NamedTuple):
    """A weight of a QAT layer.

    Args:
        layer: The layer.
        path: Its dotted path; empty for the model itself.
        name: The weight's name in the layer.
        quantizer: What quantizes it.
    """

    layer: QATLayer
    path: str
    name: str
    quantizer: WeightQuantizer

    @property
    def key(self) -> str:
        """Its dotted name in the model."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def weight(self) -> Tensor:
        """Its float values, as they are now."""
        weight: Tensor = getattr(self.layer, self.name)
        return weight


def quantized_weights(model: nn.Module) -> Iterator[QuantizedWeight]:
    """Every weight that a quantizer in training rounds, in the order of the modules."""
    for path, module in model.named_modules():
        if isinstance(module, QATLayer):
            for name in module.weight_names(module):
                quantizer = getattr(module, weight_quantizer_name(name))
                if isinstance(quantizer, WeightQuantizer):
                    yield QuantizedWeight(module, plain_path(path), name, quantizer)
