"""Quantized weights of a prepared model against its float ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from lightning_qat.export.compare.comparison import ComparedTensor
from lightning_qat.export.compare.tensor_errors import tensor_errors
from lightning_qat.export.protocol import Array
from lightning_qat.layers import QATLayer
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.quantizers.names import weight_quantizer_name
from lightning_qat.quantizers.weight import WeightQuantizer


def float_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A copy of every weight with a quantizer, by its key."""
    for key, layer, name in _weights(model):
        yield key, getattr(layer, name).detach().clone()


def weight_rows(
    model: nn.Module, real: Mapping[str, Tensor] | None = None
) -> Iterator[ComparedTensor]:
    """One row per weight of a layer, as its quantizer rounds it now.

    Args:
        model: The prepared model.
        real: What to compare with, by key; the model's own float weights by default.
    """
    for key, layer, name in _weights(model):
        quantizer = getattr(layer, weight_quantizer_name(name))
        if isinstance(quantizer, WeightQuantizer):
            weight = getattr(layer, name).detach()
            exact = weight if real is None else real[key]
            step = float(quantizer.qparams(weight).scale.max())
            rounded = quantizer(weight).detach()
            errors = tensor_errors(_array(exact), _array(rounded), step)
            yield ComparedTensor(key, key.rpartition(".")[0], errors)


def _array(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()


def _weights(model: nn.Module) -> Iterator[tuple[str, QATLayer, str]]:
    for path, layer in model.named_modules():
        if isinstance(layer, QATLayer):
            for name in layer.weight_names(layer):
                yield f"{plain_path(path)}.{name}".lstrip("."), layer, name
