"""The plan of the joins that the first batch has made, the same on every process."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer

from lightning_qat.callback.lightning_private import configuration_error
from lightning_qat.joins.apply import plan_of
from lightning_qat.joins.plan import JoinPlan


def common_plan(trainer: Trainer, pl_module: LightningModule) -> JoinPlan:
    """The plan that the forward of the first batch has made; every process must call it.

    Raises:
        MisconfigurationException: The batch did not call the module, so there is no plan, or the
            processes have different plans.
    """
    joins = plan_of(pl_module)
    # Ranges are exchanged in the order of the plan.
    same = trainer.strategy.reduce_boolean_decision(joins == trainer.strategy.broadcast(joins))
    if joins is None:
        raise configuration_error(
            f"training_step must call the module itself, so that {type(pl_module).__name__}"
            ".forward shows which tensors to quantize. Call self(...) in training_step, set "
            "example_input_array, pass QATCallback(example_inputs=...), or use a recipe with "
            "joins=False and outputs=False."
        )
    if not same:
        raise configuration_error(
            "Every process must quantize the same tensors; the first batch took another path "
            f"through {type(pl_module).__name__}.forward on some of them. Set "
            "example_input_array or pass QATCallback(example_inputs=...), so that all plan "
            "with the same data."
        )
    return joins
