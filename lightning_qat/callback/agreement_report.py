"""Verify with what was recorded in training, and report how far files are from the model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.export.manifest import MANIFEST, ExportResult
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Call, Inputs, as_call, batch_of, first_samples

_MOST = 20
"""So many notes of one target are printed; the manifest has all."""


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


def log_agreement(trainer: Trainer, result: ExportResult) -> None:
    """Print what differs from the plan, notes and agreement; log each runtime's largest difference.

    Warnings say what the agreement does not show. Logged are ``qat/<target>/max_steps``, the
    largest of all, and ``qat/<target>/<runtime>/max_steps``.
    """
    found = result.artifact
    notes = () if found is None else (*found.differences, *found.notes)
    for note in notes[:_MOST]:
        say(f"{result.target}: {note}")
    if len(notes) > _MOST:
        say(f"{result.target}: {len(notes) - _MOST} more notes are in {MANIFEST}.")
    agreement = result.agreement
    if agreement is None:
        return
    say(str(agreement))
    for caution in agreement.cautions:
        rank_zero_warn(f"QAT: {result.target}: {caution}")
    if not agreement.runtimes:
        return
    metrics = {
        f"qat/{result.target}/{re.sub(r'[^0-9a-zA-Z]+', '_', r.runtime)}/max_steps": r.max_steps
        for r in agreement.runtimes
    }
    metrics[f"qat/{result.target}/max_steps"] = max(metrics.values())
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


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
