"""Make the plan during the model's first own forward in training."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.joins.apply import apply_plan, plan_of
from lightning_qat.joins.discovery import EMPTY, Discovery
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.model.attributes import FIRST_FORWARD
from lightning_qat.model.forward import is_real_forward
from lightning_qat.recipe.recipe import Recipe


class FirstForward:
    """Plans a model during its first own forward in training mode, then lets go.

    Not in eval mode: Lightning restores the modes of the modules that it saw before validation, and
    would leave quantizers made in between in eval mode for good. Activation checkpointing runs
    parts of the forward again in backward, which must not find them changed: there the plan is made
    but waits for ``finish_plan`` or the next forward.

    Args:
        model: A model with its QAT layers.
        recipe: As for ``Discovery``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self._discovery: Discovery | None = None
        self._watching: Any = None
        self._made: tuple[Discovery, JoinPlan] | None = None
        self._handles = (
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
            model.register_state_dict_pre_hook(self._before_saving),  # type: ignore[no-untyped-call]
        )
        model.__dict__[FIRST_FORWARD] = self

    def stop(self, model: nn.Module) -> None:
        """Let go of the model."""
        self._made = None
        for handle in self._handles:
            handle.remove()
        model.__dict__.pop(FIRST_FORWARD, None)

    def _enter(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if plan_of(model) is not None:
            # A checkpoint has brought one.
            self.stop(model)
        elif self._made is not None:
            self.finish(model)
            watching = hooks_of(model)
            if watching is not None:
                # torch does not call hooks that were added while it calls those of a module.
                watching.enter(model, args)
        elif model.training and is_real_forward(model):
            self._discovery = Discovery(model, self.recipe)
            self._watching = self._discovery.watching(root_runs=True)
            self._watching.__enter__()

    def _leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        discovery, self._discovery = self._discovery, None
        if discovery is None:
            return
        self._watching.__exit__(None, None, None)
        self._watching = None
        if output is None:
            return
        discovery.outputs(output)
        plan = discovery.plan()
        if any(call.endswith(EMPTY) for call in plan.left_float):
            # An empty batch says nothing; the next one will.
            return
        discovery.release()
        self._made = discovery, plan
        if not discovery.checkpointed:
            self.finish(model)

    def _before_saving(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.finish(model)

    def finish(self, model: nn.Module) -> None:
        """Apply the plan, if it is made."""
        if self._made is not None:
            discovery, plan = self._made
            self.stop(model)
            apply_plan(model, plan)
            discovery.observe()


def is_waiting_for_forward(model: nn.Module) -> bool:
    """Whether the next forward in training makes the model's plan."""
    return FIRST_FORWARD in vars(model) and plan_of(model) is None


def finish_plan(model: nn.Module) -> None:
    """Apply a plan that was made in a forward that backward had to find unchanged."""
    waiting: FirstForward | None = vars(model).get(FIRST_FORWARD)
    if waiting is not None:
        waiting.finish(model)
