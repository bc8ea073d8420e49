"""Ranges for what only an evaluation computes: no training batch ever passes through it."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_qat.model.dry_run import call_of, unchanged_afterwards
from lightning_qat.model.inputs import Inputs
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat.quantizers.names import place
from lightning_qat.quantizers.observation_gate import ObservationGate
from lightning_qat.quantizers.switches import switch
from lightning_qat.training.range_sync import activation_quantizers, commit_pending


@naming_memory_errors(
    "calibrating what training did not run",
    "Give it a smaller batch",
)
def calibrate_unseen(
    model: nn.Module, inputs: Inputs, again: Collection[str] = (), *, agree: bool = True
) -> tuple[str, ...]:
    """Run a model in eval mode and give a range to the quantizers that have none.

    For a ``forward`` that computes something else in eval mode: a detector that decodes its boxes,
    a classifier that returns probabilities, a layer that training skips. Every other range stays
    what it is.

    Args:
        model: A prepared model that has been trained.
        inputs: What ``forward`` takes: real data, not zeros.
        again: Names that an earlier call returned, whose ranges are taken anew.
        agree: In a process group every process calls it, and the ranges are those of the inputs of
            all. ``False``: one process calls it for itself.

    Returns:
        The names of the tensors that have a range now: ``head``, ``decode.mul_0_0``.
    """
    quantizers = activation_quantizers(model)
    unseen = {n: q for n, q in quantizers.items() if q.has_seen_nothing or place(n) in again}
    if not unseen:
        return ()
    for quantizer in unseen.values():
        quantizer.forget_range()
    before = {quantizer: quantizer.switches() for quantizer in quantizers.values()}
    gate = ObservationGate()
    gate.open = gate.trains_in_eval = True
    args, kwargs = call_of(model, inputs)
    try:
        switch(quantizers.values(), observing=False)
        switch(unseen.values(), observing=True, deferred=True, gate=gate)
        # A learned range begins after several batches.
        for _ in range(max(quantizer.spec.calibration_batches for quantizer in unseen.values())):
            with unchanged_afterwards(model):
                model(*args, **kwargs)
            commit_pending(unseen, agree=agree)
    finally:
        for quantizer, switches in before.items():
            switch([quantizer], **switches)
    return tuple(place(name) for name, quantizer in unseen.items() if quantizer.calibrated)
