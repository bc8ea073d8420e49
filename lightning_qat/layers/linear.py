"""Fully connected layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_qat.layers._layer import QATLayer
from lightning_qat.model.module_input import as_module_input
from lightning_qat.numerics.int_repr import saving_int_repr
from lightning_qat.recipe.recipe import Recipe


class LinearQAT(nn.Linear, QATLayer):
    """``nn.Linear`` with fake-quantized input and weight.

    Input ``(..., in_features)``, weight scales per output feature (axis 0) or per tensor. Arguments
    are those of ``nn.Linear``.

    Args:
        in_features: Features of the input.
        out_features: Features of the output.
        bias: Whether a bias is added, in float until export.
        device: Where the parameters live.
        dtype: Only ``torch.float32``.
        config: A recipe, the name of a preset, a recipe file or a mapping, also AMCT's with
            ``retrain_data_config`` and ``retrain_weight_config``; ``int8`` by default.

    Example:
        >>> LinearQAT(4, 2)(torch.zeros(3, 5, 4)).shape
        torch.Size([3, 5, 2])
    """

    float_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        config: Recipe | Mapping[str, Any] | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_quantizers(self._spec(config))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply the fake-quantized input with the fake-quantized weight."""
        x: Tensor = self.input_quantizer(input, saves_input=True)
        weight: Tensor = self.weight_quantizer(as_module_input(self.weight))
        with saving_int_repr(x, weight):
            return functional.linear(x, weight, self.bias)
