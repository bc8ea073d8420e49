"""Quantized weights of a prepared model against its float ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_qat.export.compare.comparison import ComparedTensor
from lightning_qat.export.compare.tensor_errors import tensor_errors
from lightning_qat.export.protocol import Array
from lightning_qat.layers.quantized_weights import quantized_weights


def float_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every weight with a quantizer, by its key."""
    return {one.key: one.weight.detach().clone() for one in quantized_weights(model)}


def weight_rows(
    model: nn.Module, real: Mapping[str, Tensor] | None = None
) -> Iterator[ComparedTensor]:
    """One row per weight of a layer, as its quantizer rounds it now.

    Args:
        model: The prepared model.
        real: What to compare with, by key; the model's own float weights by default.
    """
    for one in quantized_weights(model):
        weight = one.weight.detach()
        exact = weight if real is None else real[one.key]
        step = float(one.quantizer.qparams(weight).scale.max())
        rounded = one.quantizer(weight).detach()
        errors = tensor_errors(_array(exact), _array(rounded), step)
        yield ComparedTensor(one.key, one.path, errors)


def _array(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()
