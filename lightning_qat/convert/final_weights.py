"""Weights rounded once and for all: those of layers, and those of products written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.function_hooks.running import evaluation
from lightning_qat.layers.quantized_weights import quantized_weights
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

    for one in quantized_weights(model):
        weight = computed.get(one.quantizer)
        weight = one.weight if weight is None else weight
        child = weight_quantizer_name(one.name)
        setattr(one.layer, child, final(one.quantizer, weight, one.key))
    found: dict[WeightQuantizer, FinalWeight | UnknownRange] = {**finals}
    for path, module in model.named_modules():
        if isinstance(module, WeightQuantizer) and module not in found:
            key = tensor_key(plain_path(path))
            weight = computed.get(module)
            unknown = UnknownRange(key, "its weight is not known, for forward never computes it")
            found[module] = unknown if weight is None else final(module, weight, key)
    return found


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
    for one in quantized_weights(model):
        if not isinstance(one.weight, nn.Parameter):
            called.add(one.quantizer)
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
