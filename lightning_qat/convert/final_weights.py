"""Weights rounded once and for all: those of layers, and those of products written by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.function_hooks.running import evaluation
from lightning_qat.layers import QATLayer
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.quantizers.activation import ParameterQuantizer
from lightning_qat.quantizers.final import FinalWeight, UnknownRange
from lightning_qat.quantizers.names import tensor_key, weight_quantizer_name
from lightning_qat.quantizers.weight import WeightQuantizer


def finalize_weights(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[WeightQuantizer, FinalWeight | UnknownRange]:
    """Give every layer of a model its final weights, in place.

    A weight that a forward computes from parameters (weight_norm, standardisation) is what it is in
    one run: the arithmetic before it is left out of the captured graph.

    Args:
        model: A copy in eval mode on the CPU.
        args: What ``forward`` takes by position.
        kwargs: What it takes by keyword.

    Returns:
        The final forms of the quantizers that products written by hand call. Layers that share a
        quantizer share the tensors of its final form.
    """
    computed = _computed_weights(model, args, kwargs)
    finals: dict[WeightQuantizer, FinalWeight] = {}

    def final(quantizer: WeightQuantizer, weight: Tensor, key: str) -> FinalWeight:
        if quantizer in finals:
            return finals[quantizer].named(key)
        finals[quantizer] = FinalWeight.from_weight(weight, quantizer.qparams(weight), key)
        return finals[quantizer]

    for layer, path, name in _weights(model):
        child = weight_quantizer_name(name)
        quantizer = getattr(layer, child)
        weight = computed.get(quantizer)
        weight = getattr(layer, name) if weight is None else weight
        setattr(layer, child, final(quantizer, weight, f"{path}.{name}" if path else name))
    found: dict[WeightQuantizer, FinalWeight | UnknownRange] = {**finals}
    for path, module in model.named_modules():
        if isinstance(module, WeightQuantizer) and module not in found:
            key = tensor_key(plain_path(path))
            weight = computed.get(module)
            unknown = UnknownRange(key, "its weight is not known, for forward never computes it")
            found[module] = unknown if weight is None else final(module, weight, key)
    return found


def _weights(model: nn.Module) -> Iterator[tuple[QATLayer, str, str]]:
    """Layer, its path and the name of each weight that has a quantizer."""
    for path, module in model.named_modules():
        if isinstance(module, QATLayer):
            for name in module.weight_names(module):
                if isinstance(getattr(module, weight_quantizer_name(name)), WeightQuantizer):
                    yield module, plain_path(path), name


def _computed_weights(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[WeightQuantizer, Tensor]:
    """What the quantizers of weights that are no parameters of their layer read in one run."""
    hooks = [hooks_of(module) for module in model.modules()]
    called: set[WeightQuantizer] = {
        quantizer
        for found in hooks
        for operands in (found.plan.sites.values() if found else ())
        for quantizer in operands.values()
        if isinstance(quantizer, WeightQuantizer)
    }
    for layer, _, name in _weights(model):
        if not isinstance(getattr(layer, name), nn.Parameter):
            called.add(getattr(layer, weight_quantizer_name(name)))
    measures = any(isinstance(module, ParameterQuantizer) for module in model.modules())
    if not called and not measures:
        return {}
    read: dict[WeightQuantizer, Tensor] = {}

    def keep(quantizer: Any, inputs: tuple[Tensor]) -> None:
        read[quantizer] = inputs[0].detach().clone()

    handles = [quantizer.register_forward_pre_hook(keep) for quantizer in called]
    try:
        # Their range is that of the parameters after the last optimizer step.
        with torch.no_grad(), evaluation():
            model(*args, **kwargs)
    except Exception:  # the capture, which comes next, says where
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return read
