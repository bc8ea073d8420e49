"""Plan the quantized tensors between the QAT layers of a model: now, or in its first forward."""

from __future__ import annotations

from torch import nn

from lightning_qat.joins.apply import apply_plan, keep_plan, plan_of, watch_layers
from lightning_qat.joins.first_forward import FirstForward, discover
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.model.attributes import FIRST_FORWARD
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.quantizers.factory import learns
from lightning_qat.recipe.recipe import Recipe


def plan_joins(
    model: nn.Module, recipe: Recipe, example_inputs: Inputs | None = None
) -> JoinPlan | None:
    """Plan the quantized tensors between QAT layers, and apply the plan.

    Args:
        model: A model with its QAT layers; changed in place.
        recipe: The recipe; with neither ``joins`` nor ``outputs`` there is no plan.
        example_inputs: What ``forward`` takes; ``None``: the first forward in training plans.

    Returns:
        The plan; ``None`` if the recipe wants none or the first forward will make it.

    Raises:
        ValueError: The recipe's activations have parameters, and there are no example inputs.
    """
    # After the swap, with the quantizers of the layers.
    paths = ModelPaths.of(model)
    if not (recipe.joins or recipe.outputs):
        watch_layers(model, paths)
        return None
    plan = plan_of(model)
    if plan is not None:
        return plan
    keep_plan(model, None)
    waiting: FirstForward | None = vars(model).get(FIRST_FORWARD)
    if example_inputs is None:
        if learns(recipe.activation):
            raise ValueError(
                f"Learned activations (quantizer={recipe.activation.quantizer!r}) are parameters "
                f"that the optimizer must be given, so the joins of {type(model).__name__} must be "
                "planned before training. Pass example_inputs to prepare or QATCallback, set the "
                "module's example_input_array, or use a recipe with joins=False and outputs=False."
            )
        if waiting is None:
            FirstForward(model, recipe)
        return None
    if waiting is not None:
        waiting.stop(model)
    plan = discover(model, recipe, example_inputs, paths).plan
    apply_plan(model, plan, paths)
    return plan
