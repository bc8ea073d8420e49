"""Make the plan in the model's first own forward in training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_qat.function_hooks.frame import CallPlan, Frame
from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.function_hooks.running import evaluation, running
from lightning_qat.joins.apply import apply_plan, plan_of
from lightning_qat.joins.discovery import EMPTY, Discovery
from lightning_qat.joins.plan import JoinPlan
from lightning_qat.joins.solver import Solution
from lightning_qat.model.attributes import FIRST_FORWARD
from lightning_qat.model.dry_run import call_of, unchanged_afterwards
from lightning_qat.model.forward import is_real_forward
from lightning_qat.model.inputs import Inputs, first_samples
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_private import without_function_modes
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.factory import quantizer_parameters
from lightning_qat.quantizers.observation_gate import is_training_forward
from lightning_qat.recipe.recipe import Recipe


class FirstForward:
    """Plans a model in its first own forward in training, then lets go.

    What is planned is the forward that will be exported: the model runs once more, in eval mode, on
    a few samples of the same inputs. The forward in training gives the first observations.
    Activation checkpointing runs parts of the forward again in backward, which must not find them
    changed: there the plan is made but waits for ``finish_plan`` or the next forward.

    Args:
        model: A model with its QAT layers.
        recipe: As for ``Discovery``.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.recipe = recipe
        self._training: Discovery | None = None
        self._watching: Any = None
        self._made: Callable[[], None] | None = None
        self._handles = (
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
            model.register_state_dict_pre_hook(self._before_saving),  # type: ignore[no-untyped-call]
        )
        model.__dict__[FIRST_FORWARD] = self

    def stop(self, model: nn.Module) -> None:
        """Let go of the model."""
        self._made = None
        for handle in self._handles:
            handle.remove()
        model.__dict__.pop(FIRST_FORWARD, None)

    def _enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if plan_of(model) is not None:
            # A checkpoint has brought one.
            self.stop(model)
        elif self._made is not None:
            self.finish(model)
            watching = hooks_of(model)
            if watching is not None:
                # torch does not call hooks that were added while it calls those of a module.
                watching.enter(model, args, kwargs)
        elif is_real_forward(model) and self._trains(model):
            self._training = Discovery(model, self.recipe, observes=True)
            self._watching = self._training.watching(root_runs=True)
            self._watching.__enter__()

    def _trains(self, model: nn.Module) -> bool:
        """Whether this forward trains the model; if so, tell the quantizers inside its mode."""
        gates = (module.gate for module in model.modules() if isinstance(module, Quantizer))
        frame = Frame(model, CallPlan("", {}), watched=False)
        running().frames.append(frame)
        if is_training_forward(next(gates, None), model.training):
            return True
        running().frames.remove(frame)
        return False

    def _leave(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        training, self._training = self._training, None
        if training is None:
            return
        self._watching.__exit__(None, None, None)
        running().frames.pop()
        self._watching = None
        if output is None:
            return
        training.outputs(output)
        plan, consumers = self._exported(model, args, kwargs) or training.plan()
        if any(call.endswith(EMPTY) for call in plan.left_float):
            # An empty batch says nothing; the next one will.
            return
        modules = training.paths.by_path
        # The optimizer has been given what learns.
        unreached = tuple(p for p in plan.unreached if not quantizer_parameters(modules[p]))
        plan = replace(plan, unreached=unreached)
        ranges = training.ranges_of(consumers)
        training.release()
        self._made = partial(_apply, model, plan, ranges)
        if not training.checkpointed:
            self.finish(model)

    def _exported(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Solution | None:
        """The plan of the forward in eval mode; ``None``: it cannot run on these inputs."""
        problem: Exception | None = None
        for samples in (FEW, None):
            inputs = args, kwargs
            if samples is not None:
                with without_function_modes():
                    inputs = first_samples(inputs, samples)
            discovery = Discovery(model, self.recipe)
            try:
                with unchanged_afterwards(model), evaluation(), warnings.catch_warnings():
                    # The training forward has said what there is to say.
                    warnings.simplefilter("ignore")
                    with discovery.watching():
                        output = model(*inputs[0], **inputs[1])
            except Exception as error:
                problem = error
                continue
            discovery.outputs(output)
            return discovery.plan()
        warnings.warn(
            f"{type(model).__name__}.forward does not run in eval mode on the inputs of the first "
            f"training batch ({type(problem).__name__}: {problem}), so the forward in training is "
            "planned. Pass example_inputs if the exported forward takes others.",
            stacklevel=2,
        )
        return None

    def _before_saving(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        self.finish(model)

    def finish(self, model: nn.Module) -> None:
        """Apply the plan, if it is made."""
        if self._made is not None:
            apply = self._made
            self.stop(model)
            apply()


FEW = 2
"""Samples for the forward in eval mode: its tensors are kept beside those of the training batch."""


def _apply(model: nn.Module, plan: JoinPlan, ranges: Mapping[str, Tensor]) -> None:
    """Apply a plan; quantizers that have seen nothing yet observe what the forward had for them."""
    apply_plan(model, plan)
    modules = ModelPaths.of(model).by_path
    for path, seen in ranges.items():
        quantizer = modules[path]
        assert isinstance(quantizer, ActivationQuantizer)
        fresh = not quantizer.calibrated and quantizer.pending is None
        searched = not CALIBRATIONS[quantizer.spec.calibration].min_max_only
        if fresh and quantizer.observing and not searched:
            quantizer.observe(seen)


def is_waiting_for_forward(model: nn.Module) -> bool:
    """Whether the next forward in training makes the model's plan."""
    return FIRST_FORWARD in vars(model) and plan_of(model) is None


def finish_plan(model: nn.Module) -> None:
    """Apply a plan that was made in a forward that backward had to find unchanged."""
    waiting: FirstForward | None = vars(model).get(FIRST_FORWARD)
    if waiting is not None:
        waiting.finish(model)


def discover(
    model: nn.Module, recipe: Recipe, example_inputs: Inputs, paths: ModelPaths | None = None
) -> Solution:
    """Run a model once in eval mode, without gradient and without leaving a trace, and plan it.

    Args:
        model: A model with its QAT layers.
        recipe: As for ``Discovery``.
        example_inputs: What ``forward`` takes.
        paths: The model's present paths, where the caller has them.
    """
    discovery = Discovery(model, recipe, paths)
    args, kwargs = call_of(model, example_inputs)
    with unchanged_afterwards(model), evaluation(), discovery.watching():
        output = model(*args, **kwargs)
    discovery.outputs(output)
    return discovery.plan()
