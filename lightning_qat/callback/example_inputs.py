"""The example inputs of a run: given, or recorded from the first forward in training."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from inspect import Parameter
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.callback.lightning_private import configuration_error
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.forward import is_real_forward
from lightning_qat.model.inputs import (
    Call,
    Inputs,
    as_call,
    as_float32,
    batch_of,
    first_samples,
)
from lightning_qat.model.torch_private import without_function_modes
from lightning_qat.quantizers.observation_gate import ObservationGate, is_training_forward

MOST_SAMPLES = 32
"""Enough for an agreement to mean something, little enough to keep on the CPU."""


class ExampleInputs:
    """Inputs of a module's ``forward``, for the plan of its joins and for the export.

    Args:
        given: A tensor, a tuple of positional arguments or a mapping of keyword arguments. A list
            of ints, as YAML can hold it, is the shape of one float tensor. ``None``: the module's
            ``example_input_array``, else what ``record`` has recorded.

    Attributes:
        given: The inputs that were given, if any.
        recorded: The inputs of the first real ``forward`` in training mode: positional arguments
            as a tuple, or all arguments by keyword if one was given by keyword; on the CPU, with at
            most ``MOST_SAMPLES`` samples. ``None`` until something ran.
    """

    def __init__(self, given: Any = None) -> None:
        if isinstance(given, list) and all(isinstance(n, int) for n in given):
            given = torch.zeros(given)
        self.given = given
        self.recorded: Any = None
        self._earlier: tuple[weakref.ref[nn.Module], Any] | None = None
        self._hook: Any = None
        self._gate: ObservationGate | None = None

    def before_training(self, pl_module: LightningModule) -> Any:
        """The inputs that are known without a run of the module; ``None`` if there are none."""
        return pl_module.example_input_array if self.given is None else self.given

    def known(self, pl_module: LightningModule) -> Any:
        """The inputs that are known by now, floating tensors in float32; ``None``: none are."""
        inputs = self.before_training(pl_module)
        return as_float32(self.recorded if inputs is None else inputs)

    def required(self, pl_module: LightningModule) -> Any:
        """The inputs after the first batch, floating tensors in float32.

        Raises:
            MisconfigurationException: None are given, and the batch did not show any.
        """
        inputs = self.known(pl_module)
        if inputs is None:
            raise configuration_error(
                "Export needs example inputs, and no training batch has shown them: none ran, or "
                "training_step did not call the module itself. Call self(...) in "
                f"{type(pl_module).__name__}.training_step, set example_input_array, or pass "
                "QATCallback(example_inputs=...)."
            )
        return inputs

    def training(self) -> Any:
        """What was recorded, floating tensors in float32; ``None``: nothing was."""
        return as_float32(self.recorded)

    @property
    def recording(self) -> bool:
        """``True`` between ``record`` and ``stop``."""
        return self._hook is not None

    def record(self, model: nn.Module, gate: ObservationGate | None = None) -> None:
        """Watch ``model`` until ``stop``; an earlier recording is forgotten.

        Args:
            model: The module whose ``forward`` is recorded.
            gate: Says which forwards train the model; ``None``: its mode does.
        """
        self.forget()
        self._gate = gate
        self._hook = model.register_forward_pre_hook(self._on_forward, with_kwargs=True)

    def stop(self) -> None:
        """Stop watching; the recording stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def keep(self, model: nn.Module) -> None:
        """Remember the recording as that of ``model``, for a fit that trains no batch."""
        if self.recorded is not None:
            self._earlier = weakref.ref(model), self.recorded

    def recall(self, model: nn.Module) -> None:
        """Take what an earlier fit has recorded of ``model``, if this one has nothing."""
        if self.recorded is None and self._earlier is not None and self._earlier[0]() is model:
            self.recorded = self._earlier[1]

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a module, which is another one in a copy."""
        return {**vars(self), "_earlier": None}

    def forget(self) -> None:
        """Stop watching and forget the recording."""
        self.stop()
        self.recorded = None

    def _on_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.recorded is not None or not is_real_forward(model):
            return
        if not is_training_forward(self._gate, model.training):
            return
        call = _recorded_call(model, args, kwargs)
        # Else the plan that this very forward makes would have our slicing in it.
        with without_function_modes():
            self.recorded = _first_samples(call)


def _recorded_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """A call in the simplest form that replays it as it was."""
    if not kwargs:
        return args
    bound = inspect.signature(model.forward).bind_partial(*args).arguments
    parameters = inspect.signature(model.forward).parameters
    by_keyword = {parameters[name].kind for name in bound} <= {Parameter.POSITIONAL_OR_KEYWORD}
    return {**bound, **kwargs} if by_keyword else Call(args, kwargs)


def _first_samples(inputs: Any) -> Any:
    """A copy on the CPU with at most ``MOST_SAMPLES`` samples."""

    def keep(leaf: Tensor) -> Tensor:
        return leaf.detach().cpu().clone()

    return pytree.tree_map_only(Tensor, keep, first_samples(inputs, MOST_SAMPLES))


def verification_inputs(
    model: QuantizedModel, pl_module: LightningModule, recorded: Any
) -> Inputs | None:
    """Recorded inputs in the form that a converted model takes.

    Args:
        model: The converted model.
        pl_module: The module that it was made of.
        recorded: Positional arguments as a tuple, or a mapping of keyword arguments; ``None``:
            nothing was recorded.

    Returns:
        The inputs, with as many samples as the model takes; ``None``: the model does not take them,
        because its example has other sizes or other arguments.
    """
    if recorded is None:
        return None
    example_args, example_kwargs = model.example_inputs
    call = _in_form(pl_module, as_call(recorded), len(example_args), example_kwargs)
    if call is None:
        return None
    for args, kwargs in (call, first_samples(call, batch_of(model.example_inputs))):
        try:
            model.flat_outputs(model(*args, **kwargs))
            model.flat_inputs(args, kwargs)
        except Exception:  # torch's guards and trees raise many kinds
            continue
        return Call(args, kwargs) if args and kwargs else kwargs or args
    return None


_Call = tuple[tuple[Any, ...], dict[str, Any]]


def _in_form(
    pl_module: LightningModule,
    call: _Call,
    positional: int,
    keywords: Mapping[str, Any],
) -> _Call | None:
    """A call with as many positional and the same keyword arguments as the example has."""
    try:
        arguments = dict(inspect.signature(pl_module.forward).bind(*call[0], **call[1]).arguments)
    except TypeError:
        return None
    if len(call[0]) == positional and call[1].keys() == keywords.keys():
        return call
    if len(arguments) != positional + len(keywords) or not keywords.keys() <= arguments.keys():
        return None
    named = {name: arguments.pop(name) for name in keywords}
    return tuple(arguments.values()), named
