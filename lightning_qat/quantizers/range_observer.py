"""The range of an activation and how it follows the data: the state of an activation quantizer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import running
from lightning_qat.model.torch_private import is_in_backward
from lightning_qat.numerics.arithmetic import range_qparams
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.numerics.calibration.clipping import widened_if_narrow
from lightning_qat.numerics.calibration.histogram import (
    HISTOGRAM_BINS,
    SMALLEST_REACH,
    add_to_histogram,
    histogram_range,
)
from lightning_qat.numerics.calibration.search import SAMPLES
from lightning_qat.numerics.calibration.updates import widened
from lightning_qat.numerics.gpu.launch import runs_kernels
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.numerics.rounding import as_number
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.weight_cache import tensor_state
from lightning_qat.recipe.specs import ActivationSpec

GridNumbers = tuple[Tensor, Tensor, Any, Any]
"""Scale, zero point, and its distances to the ends of the grid, on CPUs as numbers."""


class RangeObserver(Quantizer):
    """Observes tensors and keeps their range: thin state over the functions of a ``Calibration``.

    A forward in training calls ``observe_values`` (or ``observe``, if the range of the tensor is
    known); ``commit`` takes what was observed into the range.

    Args:
        spec: The calibration, a fixed range (``clip``), and the integers.

    Attributes:
        min_val: Lower end of the range, float32 scalar buffer.
        max_val: Upper end, float32 scalar buffer.
        batches: The number of batches that the range stands for, float32 scalar buffer; 0: there is
            no range yet.
        histogram: With ``calibration="histogram"``: the count of each bin over all batches, int64
            buffer ``(HISTOGRAM_BINS,)``. In a distributed run each process adds its batch to the
            histogram of the first one, and the widest range of all processes counts.
        reach: Largest absolute value of the histogram, float32 scalar buffer.
        observing: The range follows the data of training forwards; see ``in_training``.
        deferred: Observations wait for ``commit``, so that the scale is the same for a whole step
            and all processes can agree on it first; otherwise each forward commits its own, at its
            end. A first range counts at once, and so does what is called outside any hooked
            forward or in one without gradients.
        calibrated: There is a range.
        pending: ``(-min, max)`` of what was observed and not committed, float32 ``(2,)``.
    """

    min_val: Tensor
    max_val: Tensor
    batches: Tensor
    histogram: Tensor
    reach: Tensor

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__()
        self.spec: ActivationSpec = spec
        self.grid = IntegerGrid.activation(spec.bits)
        low, high = spec.clip or (0.0, 0.0)
        # By name: half-precision plugins change the default dtype.
        self.register_buffer("min_val", torch.tensor(float(low), dtype=torch.float32))
        self.register_buffer("max_val", torch.tensor(float(high), dtype=torch.float32))
        self.register_buffer("batches", torch.tensor(0.0, dtype=torch.float32))
        if CALIBRATIONS[spec.calibration].histogram:
            self.register_buffer("histogram", torch.zeros(HISTOGRAM_BINS, dtype=torch.int64))
            self.register_buffer("reach", torch.tensor(SMALLEST_REACH, dtype=torch.float32))
        self.observing = True
        self.deferred = False
        # Not derived from `batches` in forward: that would wait for the device at every call.
        self.calibrated = spec.clip is not None
        # Not a buffer: DistributedDataParallel would overwrite it with the first process's.
        self.pending: Tensor | None = None
        self._cached_qparams: tuple[Any, GridNumbers] | None = None

    @property
    def is_observing(self) -> bool:
        """Whether the tensors of this forward are observed."""
        return self.observing and self.follows_data and self.in_training

    @property
    def is_clipping(self) -> bool:
        """Whether forwards clip to the range now; then it never waits for an average to widen."""
        return False

    @property
    def follows_data(self) -> bool:
        """Whether observations still change the range; a learned one follows gradients instead."""
        return True

    @property
    def is_learning(self) -> bool:
        """Whether the range is a matter of gradients, and a commit can only widen it."""
        return False

    def observe_values(self, x: Tensor) -> None:
        """Observe a tensor that a forward quantizes, if this forward is observed."""
        if self.is_observing and x.numel():
            self._refuse_in_transform()
            self.observe(self.range_of(x))

    def observe(self, batch: Tensor) -> None:
        """Note the ``(-min, max)`` of a tensor, shape ``(2,)``; it counts once it is committed."""
        if self.spec.clip is not None:
            return
        self._refuse_in_transform()
        if is_in_backward():
            # Activation checkpointing runs the forward again in backward: it has been counted, and
            # its range must stay what it was.
            return
        seen = batch if self.pending is None else torch.maximum(self.pending, batch)
        if self.deferred:
            self.pending = seen
            return
        forward = ForwardObservations.of_this_forward()
        if forward is not None and self.calibrated:
            if self.pending is not None:
                self.pending = None
            forward.note(self, seen)
            return
        self.commit(seen)
        if forward is not None:
            forward.note_taken(self, seen)

    def _refuse_in_transform(self) -> None:
        """Refuse to observe in a function that must have no effects but its result.

        Raises:
            RuntimeError: A transform of torch.func runs.
        """
        if self.spec.clip is None and is_transforming():
            raise RuntimeError(
                "A range cannot follow the data in torch.func's transforms (vmap, grad, jvp, ...) "
                "or in forward-mode differentiation, which let a function change nothing outside; "
                f"the quantizer at {self.place or 'an unknown place'!r} observes. Run batches "
                "without the transform first, then fix the ranges: model.eval(), or "
                "lightning_qat.training.phases.finish(model) to go on in training mode."
            )

    def observes_later(self) -> bool:
        """Whether what is observed now leaves the range of this forward as it is."""
        if self.deferred:
            return True
        return self.calibrated and ForwardObservations.of_this_forward() is not None

    def range_of(self, x: Tensor) -> Tensor:
        """The ``(-min, max)`` that the calibration finds in a tensor, float32 ``(2,)``."""
        calibration, samples = CALIBRATIONS[self.spec.calibration], self.spec.samples
        if calibration.histogram:
            return self._range_of_all(x)
        if calibration.search is None:
            return batch_range(x, samples)
        return calibration.search(x, self.grid, self.spec.symmetric, samples or SAMPLES)

    @torch.no_grad()
    def _range_of_all(self, x: Tensor) -> Tensor:
        """The best range for all batches so far and this one."""
        if not is_in_backward():
            add_to_histogram(self.histogram, self.reach, x, self.spec.samples or SAMPLES)
        found = histogram_range(self.histogram, self.reach, self.grid, self.spec.symmetric)
        whole = batch_range(x)
        if self.is_clipping:
            # All batches before may say nothing of what the network computes by now.
            found = widened_if_narrow(found, whole, x, self.grid)
        # Not finite: for the commit to refuse.
        return torch.where(torch.isfinite(whole).all(), found, whole)

    @torch.no_grad()
    def commit(self, batch: Tensor) -> None:
        """Take one batch into the range; the pending observation is dropped.

        Args:
            batch: ``(-min, max)``, finite, shape ``(2,)``; see ``batch_range``.
        """
        self.pending = None
        calibration = CALIBRATIONS[self.spec.calibration]
        calibration.update(self.min_val, self.max_val, batch, self.batches)
        if calibration.averages and self.is_clipping:
            widened(self.min_val, self.max_val, batch)
        self.batches += 1
        self.range_changed()

    @torch.no_grad()
    def forget_range(self) -> None:
        """Forget the range and all observations; a fixed one stays."""
        self.pending = None
        if self.spec.clip is None:
            for buffer in self.buffers(recurse=False):
                buffer.zero_()
            if CALIBRATIONS[self.spec.calibration].histogram:
                self.reach.fill_(SMALLEST_REACH)
            self.calibrated = False

    def range_changed(self) -> None:
        """React to a new range; whoever changes ``min_val`` and ``max_val`` calls this."""
        if not self.calibrated:
            self.calibrated = True

    def _current_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point; see ``_current_numbers``."""
        return self._current_numbers()[:2]

    def _current_numbers(self) -> GridNumbers:
        """Scale, zero point and the limits of the grid, computed once while the range stays.

        It is compared by its values: an average may exchange them in ways that torch cannot see. On
        other devices than CPUs looking at them would wait: there by what torch can see, and
        whoever lets go of an average says so, see ``forget_qparams``.
        """
        if is_compiling() or is_transforming():
            return self._qparams_and_limits()
        state = self._range_state()
        if self._cached_qparams is None or self._cached_qparams[0] != state:
            with torch.inference_mode(False):
                self._cached_qparams = state, self._qparams_and_limits()
        return self._cached_qparams[1]

    def _range_state(self) -> Any:
        # Not by attribute: torch looks for these in three places first.
        low, high = self._buffers["min_val"], self._buffers["max_val"]
        assert low is not None
        assert high is not None
        return (low.item(), high.item()) if low.is_cpu else tensor_state(low, high)

    def _qparams_and_limits(self) -> GridNumbers:
        scale, zero_point = self.scale_and_zero_point()
        plainly = is_compiling() or is_transforming()
        number = zero_point if plainly else as_number(zero_point)
        return scale, zero_point, self.grid.qmin - number, self.grid.qmax - number

    def forget_qparams(self) -> None:
        """Compute scale and zero point anew: torch may not have seen that the range changed."""
        self._cached_qparams = None

    def keep_numbers(self, numbers: GridNumbers) -> None:
        """Keep the numbers of the present range, which were computed for many at once."""
        # Not by attribute: torch looks through all its parameters and buffers at every assignment.
        self.__dict__["_cached_qparams"] = self._range_state(), numbers

    @property
    def follows_range(self) -> bool:
        """Whether scale and zero point are those of the range; learned ones are parameters."""
        return True

    @property
    def learns_from_range(self) -> bool:
        """Whether a new range is where learning starts from."""
        return False

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the present range, float32 scalars without a gradient."""
        return _qparams(self.min_val, self.max_val, self)

    def notice_range(self) -> None:
        """Notice a range that came into the buffers from outside, as averages of weights put it.

        Waits for the device, and only while no range is known.
        """
        if not self.calibrated:
            self.calibrated = self._has_range()

    def _has_range(self) -> bool:
        return self.spec.clip is not None or bool(self.batches > 0)

    @property
    def has_seen_nothing(self) -> bool:
        """Whether no batch has been committed, and no range is given; waits for the device."""
        return not self.calibrated and not bool(self.batches > 0)

    @property
    def why_unknown(self) -> str:
        """The reason why there is no range, in words; for error messages."""
        return "no training batch has passed through it"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.calibrated = self._has_range()
        self.pending = None


class ForwardObservations:
    """What the quantizers of one forward have observed: one commit for all of them.

    Of several tensors of one quantizer the widest range counts, as one batch. A first range is
    taken at once, for the forward to go on with; further tensors make it wider.
    """

    def __init__(self) -> None:
        self._waiting: dict[RangeObserver, Tensor] = {}
        self._taken: dict[RangeObserver, Tensor] = {}
        # Of each quantizer the range of the forward, and its buffers, which hold another since.
        self._before: list[tuple[RangeObserver, dict[str, Tensor], dict[str, Tensor]]] = []

    @staticmethod
    def of_this_forward() -> ForwardObservations | None:
        """Those of the running forward; ``None``: it is not hooked, or may run again as a whole."""
        # Also of a forward of which torch.compile has made graphs of parts alone.
        forward_cache = running().forward_cache
        if forward_cache is None or forward_cache.may_run_again:
            return None
        if forward_cache.observations is None:
            forward_cache.observations = ForwardObservations()
        found = forward_cache.observations
        return found if isinstance(found, ForwardObservations) else None

    def note(self, quantizer: RangeObserver, batch: Tensor) -> None:
        """Note the ``(-min, max)`` of a tensor, for the end of the forward."""
        known = self._waiting.get(quantizer, self._taken.get(quantizer))
        self._waiting[quantizer] = batch if known is None else torch.maximum(known, batch)

    def note_taken(self, quantizer: RangeObserver, batch: Tensor) -> None:
        """Note a ``(-min, max)`` that the quantizer has committed."""
        self._taken[quantizer] = batch

    def commit(self, remember: bool = False) -> None:
        """Take all of it into the ranges, in a few operations for each calibration and device."""
        groups: dict[tuple[str, torch.device], list[RangeObserver]] = defaultdict(list)
        for quantizer in self._waiting:
            if quantizer in self._taken:
                # The same batch, wider.
                quantizer.batches -= 1
            groups[quantizer.spec.calibration, quantizer.min_val.device].append(quantizer)
        for quantizers in groups.values():
            if remember:
                self._remember(quantizers)
            commit_together(quantizers, torch.stack([self._waiting[q] for q in quantizers], 1))
        self._waiting.clear()
        self._taken.clear()

    def _remember(self, quantizers: Sequence[RangeObserver]) -> None:
        lows = torch.stack([q.min_val for q in quantizers]).unbind()
        highs = torch.stack([q.max_val for q in quantizers]).unbind()
        for quantizer, low, high in zip(quantizers, lows, highs, strict=True):
            buffers = {"min_val": quantizer.min_val, "max_val": quantizer.max_val}
            self._before.append((quantizer, {"min_val": low, "max_val": high}, buffers))

    @contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Give every quantizer the range again with which the forward has quantized."""
        try:
            for quantizer, before, _ in self._before:
                quantizer._buffers.update(before)
            yield
        finally:
            for quantizer, _, buffers in self._before:
                quantizer._buffers.update(buffers)


@torch.no_grad()
def commit_together(
    quantizers: Sequence[RangeObserver], batch: Tensor, accepted: Tensor | None = None
) -> None:
    """``commit`` of many quantizers of one calibration and device, in a few operations.

    Args:
        quantizers: The quantizers.
        batch: ``(-min, max)`` of each by column, shape ``(2, quantizers)``.
        accepted: Those whose range changes, bool ``(quantizers,)``; ``None``: all.
    """
    learning = [index for index, quantizer in enumerate(quantizers) if quantizer.is_learning]
    if learning:
        wanted = batch if accepted is None else batch.where(accepted, -torch.inf)
        for index in learning:
            quantizers[index].commit(wanted[:, index])
        others = sorted({*range(len(quantizers))} - {*learning})
        if others:
            columns = None if accepted is None else accepted[others]
            commit_together([quantizers[index] for index in others], batch[:, others], columns)
        return
    kept = [[getattr(q, name) for q in quantizers] for name in ("min_val", "max_val", "batches")]
    before = [torch.stack(buffers) for buffers in kept]
    low, high = before[0].clone(), before[1].clone()
    calibration = CALIBRATIONS[quantizers[0].spec.calibration]
    calibration.update(low, high, batch, before[2])
    clipping = [q.is_clipping for q in quantizers]
    if calibration.averages and any(clipping):
        if not all(clipping):
            # Minus infinity widens nothing: those that only observe keep the average.
            rest = torch.tensor(clipping, device=batch.device).logical_not()
            batch = batch.masked_fill(rest, -torch.inf)
        widened(low, high, batch)
    after = [low, high, before[2] + 1]
    if accepted is not None:
        after = [torch.where(accepted, new, old) for new, old in zip(after, before, strict=True)]
    for buffers, values in zip(kept, after, strict=True):
        # torch's optimizers are made of it, though it is not in torch.__all__.
        torch._foreach_copy_(buffers, list(values.unbind()))  # pyright: ignore[reportPrivateImportUsage]
    for quantizer in quantizers:
        quantizer.range_changed()
    keep_qparams(quantizers)


@torch.no_grad()
def keep_qparams(quantizers: Iterable[RangeObserver]) -> None:
    """Compute the numbers of many ranges in a few operations, for devices that run no kernels.

    Kernels compute the numbers themselves. Learned numbers follow their parameters.

    Args:
        quantizers: Those whose range has changed.
    """
    if is_compiling():
        return
    alike: dict[Any, list[RangeObserver]] = defaultdict(list)
    for quantizer in quantizers:
        device = quantizer.min_val.device
        if quantizer.follows_range and not runs_kernels(device):
            spec = quantizer.spec
            alike[device, quantizer.grid, spec.symmetric, bool(spec.fixed_min)].append(quantizer)
    for members in alike.values():
        low = torch.stack([quantizer.min_val for quantizer in members])
        high = torch.stack([quantizer.max_val for quantizer in members])
        scale, zero_point = _qparams(low, high, members[0])
        # Limits as numbers where looking at them costs nothing.
        grid = members[0].grid
        limits: list[Any] = [end - zero_point for end in (grid.qmin, grid.qmax)]
        limits = [end.tolist() if end.is_cpu else end.unbind() for end in limits]
        numbers = zip(scale.unbind(), zero_point.unbind(), *limits, strict=True)
        for quantizer, of_one in zip(members, numbers, strict=True):
            quantizer.keep_numbers(of_one)


def _qparams(low: Tensor, high: Tensor, like: RangeObserver) -> tuple[Tensor, Tensor]:
    """Scale and zero point of ranges on the grid of a quantizer, of any shape."""
    spec = like.spec
    if spec.fixed_min and not spec.symmetric:
        low = torch.zeros_like(low)
    return range_qparams(low, high, like.grid, spec.symmetric)
