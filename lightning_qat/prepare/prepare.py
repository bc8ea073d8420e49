"""Turn a float model into a QAT model, in place, and report what was changed and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from lightning_qat.layers import QATLayer
from lightning_qat.layers.table import LAYERS
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import require_support, trace_hooks, unwrapped
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat.prepare.plan_joins import plan_joins
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.prepare.swap import choose_layers, end_layers, swap
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.phases import check_memory, set_compact


@naming_memory_errors(
    "looking for what to quantize in one forward",
    "Give prepare a smaller example batch; any size shows the same layers and joins",
)
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
    require_support(model)
    wrapped, model = model, unwrapped(model)
    paths = ModelPaths.of(model)
    report = choose_layers(paths, recipe)
    if recipe.first_last is not None:
        recipe = recipe.with_ends(end_layers(model, paths, example_inputs))
        report = choose_layers(paths, recipe, check_patterns=False)
    if not report.swapped and not any(isinstance(m, QATLayer) for m in paths.names):
        reasons = "".join(f"\n  {s.name} ({s.kind}): {s.reason}" for s in report.skipped)
        raise ValueError(
            f"Nothing to quantize in {type(model).__name__}: at least one layer of "
            f"{sorted(kind.__name__ for kind in LAYERS)} must be selected by the recipe."
            + (f" Skipped:{reasons}" if reasons else " It has no layer with weights.")
        )
    swap(paths, report)
    joins = plan_joins(model, recipe, example_inputs)
    set_compact(model, memory == "compact")
    if wrapped is not model:
        trace_hooks(wrapped)
    return report.with_plan(joins)
