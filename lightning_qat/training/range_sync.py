"""Commit observed ranges, the same on all processes: one collective per batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.names import place
from lightning_qat.quantizers.range_observer import commit_together


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every activation quantizer of a model by dotted name, in the order of registration."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


def drop_pending(quantizers: Iterable[ActivationQuantizer]) -> None:
    """Forget observations that were not committed, such as those of a learning-rate search."""
    for quantizer in quantizers:
        if quantizer.pending is not None:
            quantizer.pending = None


def commit_ranges(model: nn.Module) -> None:
    """Take the ranges observed since the last call into every quantizer, alike on all processes.

    One flat ``all_reduce(MAX)`` of all pending ``(-min, max)`` when a process group is initialised:
    the result is the range of the global batch. Every process must call it equally often. A
    quantizer through which nothing passed on any process keeps its range.

    Args:
        model: A prepared model whose quantizers are ``deferred``.

    Raises:
        ValueError: An observed range is not finite; every such layer is named, none is changed.
    """
    commit_pending(activation_quantizers(model))


def commit_pending(quantizers: Mapping[str, ActivationQuantizer], *, agree: bool = True) -> None:
    """``commit_ranges`` of quantizers that are at hand, by name: no walk over the model.

    Args:
        quantizers: The quantizers.
        agree: Exchange the ranges with all processes, which must call it, too.
    """
    if not quantizers:
        return
    device = next(iter(quantizers.values())).min_val.device
    never = torch.full((2,), -torch.inf, device=device)
    flat = torch.stack([never if q.pending is None else q.pending for q in quantizers.values()])
    if agree and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    # The one host synchronisation of an observing batch.
    bounds = flat.tolist()
    drop_pending(quantizers.values())
    if any(torch.inf in batch for batch in bounds):
        _refuse_non_finite(dict(zip(quantizers, bounds, strict=True)))
    seen: dict[str, list[int]] = defaultdict(list)
    observed = list(quantizers.values())
    for index, (quantizer, (low, _)) in enumerate(zip(observed, bounds, strict=True)):
        if low != -torch.inf:
            seen[quantizer.spec.calibration].append(index)
    for indices in seen.values():
        batch = flat if len(indices) == len(observed) else flat[indices]
        commit_together([observed[i] for i in indices], batch.T)


def _refuse_non_finite(bounds: dict[str, list[float]]) -> None:
    bad = [place(name) for name, batch in bounds.items() if torch.inf in batch]
    raise ValueError(
        "Activations must be finite to be given a range; NaN or infinity reached the input of "
        + ", ".join(repr(name) for name in bad)
        + ". The first of them is where to look: check the data and the learning rate, or detect "
        "the operation with torch.autograd.set_detect_anomaly(True). No range was changed."
    )
