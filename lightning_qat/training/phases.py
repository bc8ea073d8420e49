"""Apply a phase to a model, and agree on ranges across processes: what a training loop calls.

``QATCallback`` calls these; a loop of one's own may as well. Without them a prepared model observes
and quantizes from the first training batch on, and each forward commits what it has observed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qat.function_hooks.hooks import hooks_of
from lightning_qat.model.attributes import BATCHNORM_HOLD
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.range_observer import keep_qparams
from lightning_qat.quantizers.switches import switch
from lightning_qat.recipe.schedule import Phase


def apply_phase(model: nn.Module, phase: Phase) -> None:
    """Set every quantizer and batch norm of a model to a phase; calling it again changes nothing.

    Observations then wait for ``commit_ranges``. A frozen batch norm is held in eval mode by a hook
    on its own forward, so a ``model.train()`` in between does not wake it up.

    Args:
        model: A prepared model.
        phase: The phase of the next batch.
    """
    switch(model, deferred=True, observing=phase.observing, quantizing=phase.quantizing)
    keep_qparams(m for m in model.modules() if isinstance(m, ActivationQuantizer))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if phase.batchnorm_frozen:
                _hold_in_eval(module)
            else:
                _release(module, model.training)


def set_observing(quantizers: Iterable[ActivationQuantizer], observing: bool) -> None:
    """Open or close the gate through which data reach the ranges."""
    switch(quantizers, observing=observing)


def set_quantizing(model: nn.Module, quantizing: bool) -> None:
    """Turn fake quantization on or off: of activations and of weights."""
    switch(model, quantizing=quantizing)


def check_memory(memory: object) -> None:
    """Refuse an unknown value of ``memory``.

    Raises:
        ValueError: It is neither ``fast`` nor ``compact``.
    """
    if memory not in ("fast", "compact"):
        raise ValueError(f"memory must be 'fast' or 'compact'; got {memory!r}.")


def set_compact(model: nn.Module, compact: bool) -> None:
    """Choose what backward keeps: little (integers and bits), or what makes it fast.

    Values and gradients are the same. While ``torch.compile`` traces, the compiler chooses.
    """
    for module in model.modules():
        hooks = hooks_of(module)
        if hooks is not None:
            hooks.plan.compact = compact
    switch(model, compact=compact)


def finish(model: nn.Module) -> None:
    """Leave a model as its exports will be: quantizing, observing nothing, batch norm let go."""
    switch(model, observing=False, quantizing=True)
    release_batchnorms(model)


def release_batchnorms(model: nn.Module) -> None:
    """Let go of every batch norm that a phase held in eval mode.

    It takes the model's mode again, or stays in eval mode if it was so before it was held.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            _release(module, model.training)


def _hold_in_eval(module: _BatchNorm) -> None:
    if BATCHNORM_HOLD not in module.__dict__:
        handle = module.register_forward_pre_hook(_to_eval)
        module.__dict__[BATCHNORM_HOLD] = handle, module.training
        module.eval()


def _release(module: _BatchNorm, training: bool) -> None:
    held: tuple[Any, bool] | None = module.__dict__.pop(BATCHNORM_HOLD, None)
    if held is not None:
        handle, was_training = held
        handle.remove()
        module.train(was_training and training)


def _to_eval(module: nn.Module, _args: tuple[Tensor, ...]) -> None:
    module.eval()
