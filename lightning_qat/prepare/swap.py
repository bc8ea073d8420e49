"""Choose the layers that a recipe selects, and swap their classes in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_qat.layers import OutputProjectionQAT, QATLayer
from lightning_qat.layers.own_class import own_class, runs_own_forward
from lightning_qat.layers.table import LAYERS, WITH_WEIGHTS, layer_for
from lightning_qat.model.dry_run import order_of_calls
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.prepare.report import PrepareReport, SkippedLayer, SwappedLayer
from lightning_qat.prepare.tied_weights import share_quantizers
from lightning_qat.quantizers.names import place, quantizer_role
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.quantizers.weight_cache import WeightGroup
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import LayerSpec


def choose_layers(
    paths: ModelPaths, recipe: Recipe, *, check_patterns: bool = True
) -> PrepareReport:
    """The layers that a recipe selects, and those it does not, with reasons; changes nothing.

    Args:
        paths: The paths of the model.
        recipe: The recipe.
        check_patterns: Refuse patterns that match no layer or contradict each other; ``False``
            where layers may still come, or the patterns have been checked.

    Raises:
        ValueError: Such patterns, or parameters of a selected layer that are not float32.
    """
    layers = {module: names for module, names in paths.names.items() if is_layer(module)}
    if check_patterns:
        kinds = {name: float_class_name(m) for m, names in layers.items() for name in names}
        recipe.check_patterns(kinds, [kind.__name__ for kind in LAYERS])
    swapped, skipped = [], []
    for module, (name, *others) in layers.items():
        kind, aliases = float_class_name(module), tuple(others)
        reason = _why_skipped(module, recipe) or recipe.why_float(name, kind, aliases)
        spec = recipe.for_layer(name, kind, aliases)
        if isinstance(module, QATLayer) and spec is not None:
            reason = _differently(module, spec) or reason
        if reason is not None or spec is None:
            skipped.append(SkippedLayer(name, kind, reason or "not selected by the recipe"))
        else:
            swapped.append(SwappedLayer(name, kind, spec, aliases))
    _refuse_other_dtypes(paths, swapped)
    return PrepareReport(tuple(swapped), tuple(skipped))


def end_layers(
    model: nn.Module, paths: ModelPaths, example_inputs: Inputs | None
) -> list[tuple[str, str, tuple[str, ...]]]:
    """The first and the last layer of a model, as ``Recipe.with_ends`` takes them.

    Args:
        model: The model.
        paths: Its paths.
        example_inputs: What ``forward`` takes, to see the order of calls in one run; ``None``: the
            order of registration.

    Returns:
        Name, float class and aliases of each.
    """
    layers = [m for m in paths.names if layer_for(m) is not None or isinstance(m, QATLayer)]
    if example_inputs is not None:
        layers = order_of_calls(model, layers, example_inputs)
    ends = []
    for layer in (*layers[:1], *layers[-1:]):
        name, *aliases = paths.names[layer]
        ends.append((name, float_class_name(layer), tuple(aliases)))
    return ends


def swap(paths: ModelPaths, report: PrepareReport) -> None:
    """Swap the layers of a report, in place.

    The paths are out of date afterwards: the layers have quantizers.
    """
    groups = [m.group for m in paths.names if isinstance(m, WeightQuantizer) and m.group]
    group = groups[0] if groups else WeightGroup()
    for layer in report.swapped:
        module = paths.by_path[layer.name]
        kind = layer_for(module)
        assert kind is not None
        swapped = kind.swap(module, layer.spec)
        switch(swapped, group=group)
        for name in swapped.quantizer_names():
            getattr(swapped, name).place = place(f"{layer.name}.{name}")
    share_quantizers(paths.by_path[layer.name] for layer in report.swapped)
    for module in paths.names:
        # In eval mode nn.TransformerEncoderLayer would hand its layers' weights to one fused float
        # kernel and call none of them; this attribute is what that kernel asks for. The encoder
        # would hand its layers nested tensors, which only that kernel takes.
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def is_layer(module: nn.Module) -> bool:
    """``True`` if the report must name a module: a layer with weights.

    The output projection of nn.MultiheadAttention is part of that layer.
    """
    part = (NonDynamicallyQuantizableLinear, OutputProjectionQAT)
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name in {kind.__name__ for kind in WITH_WEIGHTS}
    return isinstance(module, WITH_WEIGHTS) and type(module) not in part


def float_class_name(module: nn.Module) -> str:
    """The name that ``type:...`` patterns match: of the float class, for a QAT layer too."""
    if isinstance(module, QATLayer):
        return module.float_class.__name__
    if isinstance(module, torch.jit.ScriptModule):
        return str(module.original_name)
    kind = layer_for(module)
    return own_class(type(module)).__name__ if kind is None else kind.float_class.__name__


def _differently(layer: QATLayer, spec: LayerSpec) -> str | None:
    """How a QAT layer differs from what the recipe asks for; what a plan knows does not count."""
    differences = []
    for name in layer.quantizer_names():
        own: Any = getattr(getattr(layer, name), "spec", None)
        wanted: Any = spec.weight if quantizer_role(name) == "weight" else spec.activation
        keys = ("bits", "quantizer", "granularity", "symmetric")
        for key in keys if own is not None else ():
            if hasattr(own, key) and getattr(own, key) != getattr(wanted, key):
                differences.append(
                    f"{name} {key}={getattr(own, key)!r}, not {getattr(wanted, key)!r}"
                )
    if not differences:
        return None
    return (
        f"already quantized with another recipe ({'; '.join(differences)}); start from the float "
        "module to change it"
    )


def _why_skipped(module: nn.Module, recipe: Recipe) -> str | None:
    if isinstance(module, QATLayer):
        return "already quantized"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript (torch.jit.script or trace), which runs as it was compiled"
    if isinstance(module, LazyModuleMixin):
        return "its parameters have no shape yet; run the model once before prepare"
    kind = layer_for(module)
    if kind is None:
        return f"{own_class(type(module)).__name__} has no QAT form"
    if kind.opaque or not kind.weight_names(module):
        # What is computed is read by their own names.
        for weight in kind.weight_names(module):
            if not isinstance(module._parameters.get(weight), nn.Parameter):
                return f"its {weight} is computed by a hook (weight_norm or spectral_norm)"
    own = own_class(type(module))
    if own not in LAYERS:
        wrong = [str(p.dtype) for p in module.parameters() if p.dtype != torch.float32]
        if wrong or own.__module__.startswith("torch.ao."):
            return f"{own.__name__} quantizes by itself, or holds {wrong[:1] or 'float32'}"
        if runs_own_forward(own, kind) and not (recipe.joins or recipe.outputs):
            return (
                f"{own.__name__}.forward is its own, and what that multiplies is found by the plan "
                "of joins; the recipe has joins=False and outputs=False"
            )
    return kind.why_unsupported(module)


def _refuse_other_dtypes(paths: ModelPaths, swapped: list[SwappedLayer]) -> None:
    wrong = [
        f"{layer.name}.{name} is {str(parameter.dtype).removeprefix('torch.')}"
        for layer in swapped
        for name, parameter in paths.by_path[layer.name].named_parameters()
        if parameter.dtype != torch.float32
    ]
    if wrong:
        raise ValueError(
            "Parameters of quantized layers must be float32; got "
            + ", ".join(wrong)
            + ". Call model.float() first, and let a mixed precision plugin cast activations."
        )
