"""Choose the layers that a recipe selects, and swap their classes in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lightning_qat.layers import OutputProjectionQAT, QATLayer
from lightning_qat.layers.table import LAYERS, WITH_WEIGHTS
from lightning_qat.model.paths import modules_by_path
from lightning_qat.prepare.report import PrepareReport, SkippedLayer, SwappedLayer
from lightning_qat.recipe.recipe import Recipe


def plan(model: nn.Module, recipe: Recipe, *, check_patterns: bool = True) -> PrepareReport:
    """What ``prepare`` would do, without doing it; arguments and errors as there."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in modules_by_path(model).items():
        names[module].append(name)
    layers = {
        name: float_class_name(module)
        for module, all_names in names.items()
        for name in all_names
        if is_layer(module)
    }
    if check_patterns:
        recipe.check_patterns(layers, [kind.__name__ for kind in LAYERS])
    shared = _shared_parameters(names)
    swapped, skipped = [], []
    for module, all_names in names.items():
        if not is_layer(module):
            continue
        name, kind, aliases = all_names[0], float_class_name(module), tuple(all_names[1:])
        reason = _why_skipped(module) or recipe.why_float(name, kind, aliases)
        parts = (module, *module.children())
        reason = reason or next((shared[part] for part in parts if part in shared), None)
        spec = recipe.for_layer(name, kind, aliases)
        if reason is not None or spec is None:
            skipped.append(SkippedLayer(name, kind, reason or "not selected by the recipe"))
        else:
            swapped.append(SwappedLayer(name, kind, spec, aliases))
    _refuse_other_dtypes(model, swapped)
    return PrepareReport(tuple(swapped), tuple(skipped))


def swap(model: nn.Module, report: PrepareReport) -> None:
    """Do what a report says."""
    modules = modules_by_path(model)
    for layer in report.swapped:
        module = modules[layer.name]
        LAYERS[type(module)].swap(module, layer.spec)
    for module in model.modules():
        # In eval mode nn.TransformerEncoderLayer would hand its layers' weights to one fused float
        # kernel and call none of them; this attribute is what that kernel asks for. The encoder
        # would hand its layers nested tensors, which only that kernel takes.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def swap_layers(model: nn.Module, recipe: Recipe) -> PrepareReport:
    """Swap the layers that a model has so far; others may come, so patterns are not checked."""
    report = plan(model, recipe, check_patterns=False)
    swap(model, report)
    return report


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one that the report must account for: a layer with weights.

    The output projection of nn.MultiheadAttention is part of that layer.
    """
    part = (NonDynamicallyQuantizableLinear, OutputProjectionQAT)
    return isinstance(module, WITH_WEIGHTS) and type(module) not in part


def float_class_name(module: nn.Module) -> str:
    """The name that ``type:...`` patterns match: of the float class, for a QAT layer too."""
    if isinstance(module, QATLayer):
        return module.float_class.__name__
    if parametrize.is_parametrized(module):
        return type(module).__bases__[0].__name__
    return type(module).__name__


def _why_skipped(module: nn.Module) -> str | None:
    if isinstance(module, QATLayer):
        return "already quantized"
    if parametrize.is_parametrized(module):
        return "its parameters are parametrized (torch.nn.utils.parametrize)"
    kind = LAYERS.get(type(module))
    if kind is None:
        for base in LAYERS:
            if isinstance(module, base):
                return f"a subclass of {base.__name__}; only exact types are swapped"
        return f"{type(module).__name__} has no QAT form"
    for weight in kind.weight_names(module):
        if not isinstance(module._parameters.get(weight), nn.Parameter):
            return f"its {weight} is computed by a hook (weight_norm or spectral_norm)"
    return kind.why_unsupported(module)


def _shared_parameters(names: Mapping[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Reason per module that shares a parameter with another module."""
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module, all_names in names.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners[parameter].append((module, f"{all_names[0]}.{parameter_name}"))
    reasons = {}
    for users in owners.values():
        for module, own in users if len(users) > 1 else ():
            others = ", ".join(name for _, name in users if name != own)
            reasons[module] = f"its {own.rpartition('.')[2]} is shared with {others}"
    return reasons


def _refuse_other_dtypes(model: nn.Module, swapped: list[SwappedLayer]) -> None:
    modules = modules_by_path(model)
    wrong = [
        f"{layer.name}.{name} is {str(parameter.dtype).removeprefix('torch.')}"
        for layer in swapped
        for name, parameter in modules[layer.name].named_parameters()
        if parameter.dtype != torch.float32
    ]
    if wrong:
        raise ValueError(
            "Parameters of quantized layers must be float32; got "
            + ", ".join(wrong)
            + ". Call model.float() first, and let a mixed precision plugin cast activations."
        )
