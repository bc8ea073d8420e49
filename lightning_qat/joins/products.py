"""Products with a weight that no layer calls: which quantizer rounds the weight, along which axis.

A weight is what depends on parameters and buffers alone, whatever arithmetic made it. It is rounded
where the product reads it; the arithmetic before stays exact and is folded at export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_qat.function_hooks.call_site import is_called_by_layer
from lightning_qat.function_hooks.forward_cache import Key
from lightning_qat.joins.calls import Call, Operand
from lightning_qat.joins.plan import PlannedTensor, PlannedWeight
from lightning_qat.layers import QATLayer
from lightning_qat.layers.own_class import has_own_forward, has_own_products
from lightning_qat.quantizers import names
from lightning_qat.recipe.specs import ActivationSpec, LayerSpec

_GROUPS = 6
"""Where ``torch.nn.functional.conv_transpose2d`` takes its groups by position."""


class Channels(NamedTuple):
    """Where a product has the output channels in its weight.

    Args:
        axis: Their axis; ``None``: one scale serves all, for no axis holds them.
        groups: Of a transposed convolution.
    """

    axis: int | None
    groups: int = 1


def weight_channels(
    function: str, number: int, weight: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Channels:
    """The output channels of a product's weight.

    Args:
        function: Name of the operator.
        number: The operand that is the weight.
        weight: The weight.
        args: The call's arguments by position.
        kwargs: Those by keyword.
    """
    if function.startswith("conv_transpose"):
        groups = kwargs.get("groups", args[_GROUPS] if len(args) > _GROUPS else 1)
        return Channels(1, groups) if number == 1 else Channels(None)
    if function in ("linear", "conv1d", "conv2d", "conv3d"):
        return Channels(0 if number == 1 and weight.dim() > 1 else None)
    matrix = function in ("matmul", "addmm") and weight.dim() == 2
    return Channels(1 if matrix and number == 1 else None)


@dataclass(frozen=True)
class WeightUse:
    """A weight that a product reads.

    Args:
        operand: The consumer.
        tensor: The weight.
        layer: Path of the QAT layer whose quantizers serve; ``None``: it needs one of its own.
        weight: The quantizer that it needs.
    """

    operand: Operand
    tensor: Key
    layer: str | None
    weight: PlannedWeight


def weights_read(
    call: Call,
    numbers: Sequence[int],
    own: nn.Module,
    owners: Mapping[int, str],
    spec: LayerSpec,
) -> dict[Operand, WeightUse]:
    """The weights that a call reads, by its operands.

    Args:
        call: The call of a product.
        numbers: Those of its operands that are weights.
        own: The module that makes the call.
        owners: As ``weight_owners`` gives them.
        spec: What the recipe says of a weight of that module.
    """
    found = {}
    for number in numbers:
        x, operand = call.tensors[number], call.operand(number)
        channels = weight_channels(call.function, number, x, call.args, call.kwargs)
        layer = layer_of_weight(own, call.module, owners, x, channels)
        weight = planned_weight(spec, channels)
        found[operand] = WeightUse(operand, call.keys[number], layer, weight)
    return found


def is_a_layers_own(module: nn.Module) -> bool:
    """Whether a QAT layer or torch's own makes the present call, not a user's class before it.

    Args:
        module: Whose forward runs.
    """
    if isinstance(module, QATLayer) and not has_own_forward(module):
        return True
    return is_called_by_layer() and not has_own_products(module)


def planned_weight(spec: LayerSpec, channels: Channels) -> PlannedWeight:
    """The quantizer of a weight without a layer; learned scales are for layers."""
    weight = spec.weight
    if weight.quantizer in ("learned", "ulq"):
        weight = replace(weight, quantizer="minmax")
    if channels.axis is None:
        weight = replace(weight, granularity="per_tensor")
    return PlannedWeight(weight, channels.axis or 0, channels.groups)


def weight_quantizers(uses: Sequence[WeightUse]) -> dict[Operand, tuple[str, PlannedTensor | None]]:
    """The quantizer of each weight, by its consumer: a path, and the plan of one that is new.

    A weight that several products read has one quantizer; so has one operand of a call that runs
    several times.
    """
    found: dict[Operand, tuple[str, PlannedTensor | None]] = {}
    first: dict[Any, str] = {}
    planned: dict[str, PlannedTensor] = {}
    for use in uses:
        if use.layer is not None:
            weight = names.weight_quantizer_name("weight")
            found.setdefault(use.operand, (f"{use.layer}.{weight}".lstrip("."), None))
            continue
        one = use.operand
        same = use.tensor, use.weight
        path = found[one][0] if one in found else first.get(same)
        path = path or names.join_path(one.module, one.function, one.call, "weight")
        first.setdefault(same, path)
        before = planned.get(path)
        consumers = dict.fromkeys((*(before.consumers if before else ()), str(one)))
        spec = ActivationSpec(bits=use.weight.spec.bits, symmetric=True, quantizer="weight")
        planned[path] = PlannedTensor(path, spec, ("weights",), tuple(consumers), use.weight)
        found[one] = path, None
    return {one: (path, planned.get(path)) for one, (path, _) in found.items()}


def layer_of_weight(
    own: nn.Module, path: str, owners: Mapping[int, str], x: Tensor, channels: Channels
) -> str | None:
    """Path of the QAT layer whose weight a product reads; ``None``: it is no layer's.

    Args:
        own: The module that makes the call: a layer with a forward of its own reads its weight, or
            what it makes of it.
        path: Its path.
        owners: Identity of each layer's weight to the layer's path.
        x: The weight that the product reads.
        channels: Where it has the output channels.
    """
    parameter = x if x._base is None else x._base
    if isinstance(own, QATLayer) and own.weight_names(own) == ("weight",):
        anothers = isinstance(parameter, nn.Parameter) and parameter is not own.weight
        fits = own.weight.shape == x.shape and own.channel_axis == channels.axis
        if fits and own.channel_groups() == channels.groups and not anothers:
            return path
    return owners.get(id(x)) if channels.axis == 0 else None


def weight_owners(modules: Mapping[str, nn.Module]) -> Mapping[int, str]:
    """The layer of each parameter that is a layer's weight with its output channels in front."""
    found: dict[int, str] = {}
    for path, module in modules.items():
        if isinstance(module, QATLayer) and module.weight_names(module) == ("weight",):
            weight = module._parameters.get("weight")
            if weight is not None and module.channel_axis == 0:
                found.setdefault(id(weight), path)
    return found
