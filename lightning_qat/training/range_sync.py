"""Commit observed ranges, the same on all processes: one collective per batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_qat.numerics.gpu.range_rows import drop_fresh_ranges, fresh_range
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
    quantizers = activation_quantizers(model)
    commit_pending(quantizers)
    _count(quantizers)


def commit_pending(quantizers: Mapping[str, ActivationQuantizer], *, agree: bool = True) -> None:
    """``commit_ranges`` of quantizers that are at hand, by name: no walk over the model.

    Args:
        quantizers: The quantizers.
        agree: Exchange the ranges with all processes, which must call it, too.
    """
    if not quantizers:
        return
    flat = _pending_of_all(quantizers.values(), agree=agree)
    # The one time that a batch waits for the device.
    bounds = flat.tolist()
    drop_pending(quantizers.values())
    if any(torch.inf in batch for batch in bounds):
        bad = [name for name, batch in zip(quantizers, bounds, strict=True) if torch.inf in batch]
        raise _non_finite(bad)
    seen: dict[str, list[int]] = defaultdict(list)
    observed = list(quantizers.values())
    for index, (quantizer, (low, _)) in enumerate(zip(observed, bounds, strict=True)):
        if low != -torch.inf:
            seen[quantizer.spec.calibration].append(index)
    for indices in seen.values():
        batch = flat if len(indices) == len(observed) else flat[indices]
        commit_together([observed[i] for i in indices], batch.T)


class RangeCommits:
    """Commits the ranges of batch after batch, and lets Python run ahead of a GPU.

    On a CPU, and until every range is known, it is ``commit_pending``. Afterwards nothing is looked
    at: a batch that is not finite changes no range, and is reported with the next one.
    """

    def __init__(self) -> None:
        self._unchecked: tuple[list[str], Tensor, torch.cuda.Event | None] | None = None

    def commit(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        """Take what was observed into every quantizer, alike on all processes.

        Raises:
            ValueError: A range of this batch or of the one before is not finite.
        """
        self.check()
        # The same ones on all processes: a learned range begins when the ranges of all are taken,
        # and the batches it is compared with are counted.
        following = {name: q for name, q in quantizers.items() if q.follows_data}
        if following:
            self._take(following)
        _count(quantizers)

    def _take(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        if any(map(_must_look, quantizers.values())):
            commit_pending(quantizers)
            return
        flat = _pending_of_all(quantizers.values(), agree=True)
        drop_pending(quantizers.values())
        infinite = (flat == torch.inf).any(1)
        accepted = (flat[:, 0] != -torch.inf) & ~infinite.any()
        by_calibration: dict[str, list[int]] = defaultdict(list)
        observed = list(quantizers.values())
        for index, quantizer in enumerate(observed):
            by_calibration[quantizer.spec.calibration].append(index)
        for indices in by_calibration.values():
            rows = slice(None) if len(by_calibration) == 1 else indices
            commit_together([observed[i] for i in indices], flat[rows].T, accepted[rows])
        self._unchecked = list(quantizers), *_on_its_way(infinite)

    def check(self) -> None:
        """Wait for the last batch that nobody has looked at, if there is one.

        Raises:
            ValueError: It was not finite; every layer is named.
        """
        if self._unchecked is None:
            return
        (names, infinite, arrived), self._unchecked = self._unchecked, None
        if arrived is not None:
            arrived.synchronize()
        bad = [name for name, is_bad in zip(names, infinite.tolist(), strict=True) if is_bad]
        if bad:
            raise _non_finite(bad)


def _pending_of_all(quantizers: Iterable[ActivationQuantizer], *, agree: bool) -> Tensor:
    """``(-min, max)`` by row, of all processes; ``-inf`` where nothing was observed."""
    ranges = [fresh_range(q.min_val.device) if q.pending is None else q.pending for q in quantizers]
    flat = torch.stack(ranges)
    drop_fresh_ranges()
    if agree and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    return flat


def _count(quantizers: Mapping[str, ActivationQuantizer]) -> None:
    for quantizer in quantizers.values():
        if quantizer.deferred:
            quantizer.count_batch()


def _must_look(quantizer: ActivationQuantizer) -> bool:
    """Whether Python has to know what was observed: a range is missing, or learning begins."""
    return quantizer.min_val.is_cpu or not quantizer.calibrated or quantizer.learns_from_range


def _on_its_way(flags: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU that is made while Python goes on, and the event that it is there."""
    if flags.device.type != "cuda":
        return flags, None
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
    copy.copy_(flags, non_blocking=True)
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return copy, arrived


def _non_finite(names: list[str]) -> ValueError:
    return ValueError(
        "Activations must be finite to be given a range; NaN or infinity reached the input of "
        + ", ".join(repr(place(name)) for name in names)
        + ". The first of them is where to look: check the data and the learning rate, or detect "
        "the operation with torch.autograd.set_detect_anomaly(True). No range was changed."
    )
