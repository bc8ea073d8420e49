"""Batches of what ``forward`` takes, and the ranges that a model's tensors have on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.model.dry_run import call_of, unchanged_afterwards
from lightning_qat.model.inputs import Call, Inputs, as_call
from lightning_qat.quantizers.names import place
from lightning_qat.quantizers.observation_gate import ObservationGate
from lightning_qat.quantizers.switches import switch
from lightning_qat.training.range_sync import activation_quantizers, commit_pending

MOST_RECORDED = 16
"""How many calls of ``forward`` are kept of an evaluation, to calibrate with."""


def as_batches(data: Any) -> list[Call]:
    """The batches that a user gave, on the CPU, to be run any number of times.

    A loader that shuffles or augments gives other batches every time; these stay the same.

    Args:
        data: An iterable of what ``forward`` takes; or one tensor, one mapping.

    Raises:
        ValueError: There is none, or one holds no tensor.
    """
    whole = isinstance(data, Tensor | Mapping | Call)
    batches = [Call(*as_call(batch)) for batch in ([data] if whole else data)]
    if not batches:
        raise ValueError(
            "data must give at least one batch of what forward takes; it is empty. An iterator "
            "that was used before gives nothing more: pass a list or a loader."
        )
    return batches


def run_batch(model: nn.Module, batch: Inputs) -> Any:
    """Run a model on one batch in eval mode, without gradients.

    Raises:
        ValueError: ``forward`` does not take it.
    """
    args, kwargs = call_of(model, batch)
    try:
        with unchanged_afterwards(model):
            return model(*args, **kwargs)
    except TypeError as error:
        if "positional argument" not in str(error) and "keyword argument" not in str(error):
            raise
        raise ValueError(
            f"Each batch of data must be what {type(model).__name__}.forward takes; got "
            f"{_described(args, kwargs)}: {error}. A loader that gives labels, too: "
            "data=[x for x, _ in loader]."
        ) from error


def observe(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Observe the float model on batches; what is quantized has its range afterwards.

    Every quantizer is off meanwhile, so a range does not depend on which others are on.

    Args:
        model: A prepared model with its plan; ranges that it has are forgotten.
        batches: What ``forward`` takes. Fewer batches than a learned range asks for are repeated.
    """
    quantizers = activation_quantizers(model)
    for quantizer in quantizers.values():
        quantizer.forget_range()
    gate = ObservationGate()
    gate.open = gate.trains_in_eval = True
    wanted = max((q.spec.calibration_batches for q in quantizers.values()), default=1)
    repeats = -(-wanted // len(batches))
    try:
        switch(model, quantizing=False, observing=True, deferred=True, gate=gate)
        for batch in list(batches) * repeats:
            run_batch(model, batch)
            commit_pending(quantizers, agree=False)
    finally:
        switch(model, observing=False, gate=None)


def without_range(model: nn.Module) -> list[str]:
    """The quantized tensors that no calibration batch has reached."""
    quantizers = activation_quantizers(model)
    return [place(name) for name, q in quantizers.items() if q.follows_data and not q.calibrated]


@contextmanager
def recorded_calls(model: nn.Module, calls: list[Call]) -> Iterator[None]:
    """Note what the model's own forward is given, up to ``MOST_RECORDED`` times."""

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(calls) < MOST_RECORDED and any(_tensors((args, kwargs))):
            calls.append(Call(*as_call(Call(args, kwargs))))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _tensors(value: Any) -> Iterable[bool]:
    return (isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    def of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
        return type(value).__name__

    given = [*map(of, args), *(f"{name}={of(value)}" for name, value in kwargs.items())]
    return f"({', '.join(given)})"
