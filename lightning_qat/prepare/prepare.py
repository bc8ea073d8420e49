"""Turn a float model into a QAT model, in place, and say what was done and what was not."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_qat.joins.apply import apply_plan, keep_plan, plan_of, watch_layers
from lightning_qat.joins.discovery import discover
from lightning_qat.joins.first_forward import FirstForward
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.layers import QATLayer
from lightning_qat.layers.table import LAYERS
from lightning_qat.model.dry_run import order_of_calls
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import modules_by_path
from lightning_qat.model.torch_compile import plain_path, unwrapped
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import float_class_name, plan, swap
from lightning_qat.quantizers.factory import learns
from lightning_qat.quantizers.names import PLAN, quantizer_of_key, quantizer_role
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.phases import check_memory, set_compact


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
        layer, _, name = (quantizer_of_key(key) or "").rpartition(".")
        role = quantizer_role(name)
        if role is not None:
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
    if PLAN in state_dict:
        apply_plan(model, JoinPlan.from_dict(state_dict[PLAN]))
    return replace(report, joins=plan_of(model))
