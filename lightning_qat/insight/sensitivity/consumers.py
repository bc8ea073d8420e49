"""Give every layer of a calibrated model quantizers that no other layer and no call shares.

A plan has one quantizer for a tensor, whoever reads it. To quantize one layer alone, or all but
one, its input must be quantized for it alone.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace

from torch import nn

from lightning_qat.function_hooks.function_table import reader_kind
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.joins.apply import apply_plan, plan_of
from lightning_qat.joins.held import hold_joins
from lightning_qat.joins.plan import JoinPlan, PlannedTensor
from lightning_qat.layers import QATLayer
from lightning_qat.model.paths import ModelPaths
from lightning_qat.quantizers import names
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.weight import WeightQuantizer

_OPERAND = re.compile(r"(?:(.*)\.)?([^.]+):(\d+)\[(\d+)\]")


def give_own_quantizers(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Copy quantizers that several consumers share, in place; all copies have the same numbers.

    Returns:
        The paths of the quantizers that were one, for each that was shared: those of layers in the
        order in which the layers run, then that of the calls. A recipe gives such a tensor the
        spec of the first of these layers that it quantizes.
    """
    plan = plan_of(model)
    shared = () if plan is None else _of_plan(model, plan)
    _of_tied_weights(model)
    return shared


def called_quantizers(model: nn.Module) -> set[Quantizer]:
    """The quantizers that functional calls and outputs read, which hooks watch over."""
    hooks = [found for found in map(hooks_of, model.modules()) if found is not None]
    return {
        quantizer
        for found in hooks
        for operands in found.plan.sites.values()
        for quantizer in operands.values()
        if isinstance(quantizer, Quantizer)
    }


def _of_plan(model: nn.Module, plan: JoinPlan) -> tuple[tuple[str, ...], ...]:
    modules = ModelPaths.of(model).by_path
    moved: dict[str, str] = {}
    tensors: list[PlannedTensor] = []
    shared: list[tuple[str, ...]] = []
    for tensor in plan.tensors:
        if tensor.weight is not None or not tensor.quantizer.endswith(names.INPUT):
            tensors.append(tensor)
            continue
        one = modules[tensor.quantizer]
        calls = [found for found in map(_OPERAND.fullmatch, tensor.consumers) if found]
        layers = [c for c in tensor.consumers if not _OPERAND.fullmatch(c)]
        paths = [names.input_path("" if c == "input" else c) for c in layers]
        for path in paths:
            if path != tensor.quantizer:
                owner = modules[names.owner_path(path)]
                setattr(owner, names.INPUT, _copied(one, path))
        tensors.append(tensor)
        if calls:
            # A product has the bits of a layer; see ``Recipe.join_bits``.
            one_call = next((c for c in calls if reader_kind(c[2]) == "product"), calls[0])
            module, function, call, operand = one_call.groups()
            new = names.join_path(module or "", function, call, operand)
            hold_joins(modules[module or ""])[new.rpartition(".")[2]] = _copied(one, new)
            moved[tensor.quantizer] = new
            tensors.append(replace(tensor, quantizer=new))
            paths.append(new)
        if len(paths) > 1:
            shared.append(tuple(paths))
    sites = {
        module: {
            call: {number: moved.get(path, path) for number, path in operands.items()}
            for call, operands in calls_of.items()
        }
        for module, calls_of in plan.sites.items()
    }
    apply_plan(model, replace(plan, tensors=tuple(tensors), sites=sites, links={}))
    return tuple(shared)


def _of_tied_weights(model: nn.Module) -> None:
    called, seen = called_quantizers(model), set[nn.Module]()
    for layer in model.modules():
        for name, child in list(layer.named_children()) if isinstance(layer, QATLayer) else ():
            if isinstance(child, WeightQuantizer) and child not in called:
                if child in seen:
                    setattr(layer, name, copy.deepcopy(child))
                seen.add(child)


def _copied(quantizer: nn.Module, path: str) -> ActivationQuantizer:
    twin = copy.deepcopy(quantizer)
    assert isinstance(twin, ActivationQuantizer)
    # The key by which a forward knows that it has quantized a tensor.
    twin.identity = object()
    twin.place = names.place(path)
    return twin
