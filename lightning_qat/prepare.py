"""Turn a float model into a QAT model, in place, and say what was done and what was not."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from lightning_qat.compiled import modules_by_path, plain_path, unwrapped
from lightning_qat.discovery import FirstForward, discover
from lightning_qat.dry_run import order_of_calls
from lightning_qat.join_plan import (
    STATE_KEY,
    JoinPlan,
    apply_plan,
    keep_plan,
    plan_of,
    watch_layers,
)
from lightning_qat.layers import (
    GRUQAT,
    LSTMQAT,
    WITH_WEIGHTS,
    Conv1dQAT,
    Conv2dQAT,
    Conv3dQAT,
    ConvTranspose1dQAT,
    ConvTranspose2dQAT,
    ConvTranspose3dQAT,
    EmbeddingQAT,
    LinearQAT,
    MultiheadAttentionQAT,
    OutputProjectionQAT,
    QATLayer,
    quantizer_role,
)
from lightning_qat.learned_quantizers import learns
from lightning_qat.phases import check_memory, set_compact
from lightning_qat.quantized_model import Inputs
from lightning_qat.recipe import LayerSpec, Recipe

LAYERS: Mapping[type[nn.Module], type[QATLayer]] = {
    layer.float_class: layer
    for layer in (
        *(Conv1dQAT, Conv2dQAT, Conv3dQAT),
        *(ConvTranspose1dQAT, ConvTranspose2dQAT, ConvTranspose3dQAT),
        *(LinearQAT, EmbeddingQAT, MultiheadAttentionQAT, LSTMQAT, GRUQAT),
    )
}
"""Float layer to QAT layer. A new layer is one class and one entry here."""

_WEIGHT_ONLY = {k.__name__ for k, layer in LAYERS.items() if not layer.quantizes_input}


@dataclass(frozen=True)
class SwappedLayer:
    """A layer that became a QAT layer.

    Args:
        name: Dotted module name; the first one where a module has several.
        kind: Name of the float class.
        spec: Its quantizers.
        aliases: Further names of the same module.
    """

    name: str
    kind: str
    spec: LayerSpec
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SkippedLayer:
    """A layer with weights that stays as it is, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class PrepareReport:
    """What ``prepare`` did. ``print`` shows a table.

    Args:
        swapped: Layers that became QAT layers.
        skipped: Layers with weights that stay as they are.
        joins: The plan of all quantized tensors; ``None`` when there is none, or not yet.
    """

    swapped: tuple[SwappedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    joins: JoinPlan | None = None

    def after(self, earlier: PrepareReport) -> PrepareReport:
        """One report of two passes over a model, of which this is the later."""
        kept = {layer.name for layer in self.skipped}
        first = tuple(layer for layer in earlier.swapped if layer.name in kept)
        names = {layer.name for layer in first}
        skipped = tuple(layer for layer in self.skipped if layer.name not in names)
        return PrepareReport(first + self.swapped, skipped, self.joins)

    def __str__(self) -> str:
        """One line per layer."""
        names = [s.name for s in self.swapped] + [s.name for s in self.skipped]
        width = max(map(len, names), default=0)
        lines = [f"{len(self.swapped)} layers quantized, {len(self.skipped)} left as they are"]
        for layer in self.swapped:
            weight, activation = layer.spec.weight, layer.spec.activation
            aliases = f" (also {', '.join(layer.aliases)})" if layer.aliases else ""
            kind = "symmetric" if activation.symmetric else "affine"
            reads = f", input {activation.bits} bits {kind}"
            lines.append(
                f"  {layer.name:{width}}  {layer.kind}: weight {weight.bits} bits "
                f"{weight.granularity} {weight.quantizer}"
                f"{'' if layer.kind in _WEIGHT_ONLY else reads}{aliases}"
            )
        for skipped in self.skipped:
            lines.append(
                f"  {skipped.name:{width}}  {skipped.kind}: left as it is, {skipped.reason}"
            )
        if self.joins is not None:
            lines.append(str(self.joins))
        return "\n".join(lines)


def prepare(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path = "int8",
    example_inputs: Inputs | None = None,
    memory: Literal["fast", "compact"] = "fast",
) -> PrepareReport:
    """Turn the layers that a recipe selects into QAT layers, in place, and plan the joins.

    A swap changes the layer's class and adds two quantizers; the module object, its parameters,
    names, hooks and aliases stay, so optimizers and checkpoints go on working. Only exact types are
    swapped. Layers that are QAT layers already are left alone, so ``prepare`` may be called again.

    With ``joins`` or ``outputs`` in the recipe every tensor between the layers is planned by
    running ``forward`` once: at once with ``example_inputs``, in eval mode and without a trace,
    else during the model's first own forward in training mode. Under DDP every process must make
    it in the same batch, or be given ``example_inputs``. The plan travels with the model's
    state_dict, and a state_dict that brings one needs no run.

    Args:
        model: A model with float32 parameters.
        recipe: A recipe, the name of a preset (``int8``, ``w4a8``, ``w4a4``, ``a16w8``, ``amct``),
            a YAML or JSON file, or a mapping.
        example_inputs: What ``forward`` takes: a tensor, positional arguments as a tuple, or
            keyword arguments as a mapping.
        memory: What training keeps for backward, with the same numbers and gradients. ``compact``
            keeps tensors on a grid as their integers and of relu one bit per element, in all less
            than float training does; ``fast`` keeps what makes backward fastest. Learned ranges
            need their float input in both.

    Returns:
        What was swapped and what was skipped, with reasons, and the plan when it is made.

    Raises:
        ValueError: An unknown preset, key or ``memory``, patterns that match no layer or contradict
            each other, parameters that are not float32, or a model in which nothing can be
            quantized. The model is unchanged then.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> print(prepare(model, Recipe(exclude=("2",), outputs=False)))
        1 layers quantized, 1 left as they are
          0  Linear: weight 8 bits per_channel minmax, input 8 bits affine
          2  Linear: left as it is, excluded by the recipe (exclude: '2')
    """
    check_memory(memory)
    recipe = Recipe.load(recipe)
    model = unwrapped(model)
    report = plan(model, recipe)
    if recipe.first_last is not None:
        recipe = recipe.with_ends(_ends(model, example_inputs))
        report = plan(model, recipe, check_patterns=False)
    if not report.swapped and not any(isinstance(m, QATLayer) for m in model.modules()):
        reasons = "".join(f"\n  {s.name} ({s.kind}): {s.reason}" for s in report.skipped)
        raise ValueError(
            f"Nothing to quantize in {type(model).__name__}: at least one layer of "
            f"{sorted(kind.__name__ for kind in LAYERS)} must be selected by the recipe."
            + (f" Skipped:{reasons}" if reasons else " It has no layer with weights.")
        )
    swap(model, report)
    joins = plan_joins(model, recipe, example_inputs)
    set_compact(model, memory == "compact")
    return replace(report, joins=joins)


def plan_joins(
    model: nn.Module, recipe: Recipe, example_inputs: Inputs | None = None
) -> JoinPlan | None:
    """Plan the tensors between QAT layers; arguments as for ``prepare``.

    Returns:
        The plan; ``None`` when the recipe wants none or the first forward will make it.
    """
    if not (recipe.joins or recipe.outputs):
        watch_layers(model)
        return None
    if plan_of(model) is None:
        keep_plan(model, None)
        if example_inputs is None:
            _refuse_late_parameters(model, recipe)
            if "_qat_first_forward" not in vars(model):
                FirstForward(model, recipe)
            return None
        waiting: FirstForward | None = vars(model).get("_qat_first_forward")
        if waiting is not None:
            waiting.stop(model)
        apply_plan(model, discover(model, recipe, example_inputs))
    return plan_of(model)


def _ends(
    model: nn.Module, example_inputs: Inputs | None
) -> list[tuple[str, str, tuple[str, ...]]]:
    """The first and the last layer, as ``Recipe.with_ends`` wants them."""
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in modules_by_path(model).items():
        if type(module) in LAYERS or isinstance(module, QATLayer):
            names[module].append(name)
    layers = list(names)
    if example_inputs is not None:
        layers = order_of_calls(model, layers, example_inputs)
    return [
        (names[layer][0], float_class_name(layer), tuple(names[layer][1:]))
        for layer in (*layers[:1], *layers[-1:])
    ]


def _refuse_late_parameters(model: nn.Module, recipe: Recipe) -> None:
    if learns(recipe.activation):
        raise ValueError(
            f"Learned activations (quantizer={recipe.activation.quantizer!r}) are parameters that "
            "the optimizer must be given, so the joins of "
            f"{type(model).__name__} must be planned before training. Pass example_inputs to "
            "prepare or QATCallback, set the module's example_input_array, or use a recipe with "
            "joins=False and outputs=False."
        )


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


def prepare_like(model: nn.Module, state_dict: Mapping[str, Any]) -> PrepareReport:
    """Swap exactly the layers that are QAT layers in a checkpoint, with its specs, in place.

    Args:
        model: A float model.
        state_dict: A QAT model's ``state_dict``; it names every quantizer and its spec.

    Raises:
        ValueError: It holds no quantizers, or names a layer that the model does not have.
    """
    specs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in state_dict.items():
        layer, _, name = key.removesuffix("._extra_state").rpartition(".")
        role = quantizer_role(name)
        if role is not None and key.endswith("._extra_state"):
            # The last one counts: a layer's input comes first, and a plan may have changed it.
            specs[layer][role] = value
    if not specs:
        raise ValueError(
            "The state_dict holds no quantizers: it is of a float model. Load it into the float "
            "model, then call prepare."
        )
    state_dict = {plain_path(key): value for key, value in state_dict.items()}
    layers = modules_by_path(model)
    for name in [name for name in specs if type(layers.get(name)) not in LAYERS]:
        # A projection has the spec of its attention.
        owner = name.rpartition(".")[0]
        if type(layers.get(owner)) is nn.MultiheadAttention:
            specs[owner] = specs.pop(name)
    unknown = [name for name in specs if type(layers.get(name)) not in LAYERS]
    if unknown:
        raise ValueError(
            f"The checkpoint quantizes {unknown}, which {type(model).__name__} does not have as "
            f"{sorted(kind.__name__ for kind in LAYERS)} layers. Build the model that was trained."
        )
    # A name may hold what a pattern would take for a wildcard.
    patterns: dict[str, Any] = {glob.escape(name): change for name, change in specs.items()}
    recipe = Recipe(include=tuple(patterns), overrides=patterns)
    report = plan(model, recipe)
    swap(model, report)
    if STATE_KEY in state_dict:
        apply_plan(model, JoinPlan.from_dict(state_dict[STATE_KEY]))
    return replace(report, joins=plan_of(model))
