"""The modules that hold a tensor's range while it trains, and its numbers when they are final."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks
from lightning_qat.numerics.arithmetic import affine_qparams, symmetric_scale
from lightning_qat.numerics.calibration.histogram import (
    HISTOGRAM_BINS,
    SMALLEST_REACH,
    add_to_histogram,
    histogram_range,
)
from lightning_qat.numerics.calibration.search import SAMPLES, SEARCHES
from lightning_qat.numerics.calibration.updates import BY_RANGE, UPDATES
from lightning_qat.numerics.fake_quantize import (
    clamp_and_quantize,
    clamps,
    fake_quantize,
    fake_quantizer,
)
from lightning_qat.numerics.min_max import Observe, batch_range
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.torch_onnx_export import is_exporting_onnx, quantize_dequantize
from lightning_qat.recipe.specs import ActivationSpec


class ActivationQuantizer(Quantizer):
    r"""Fake-quantizes an activation per tensor, with a range that follows the data.

    .. math:: y = s \cdot (\mathrm{clip}(\mathrm{round}(x / s) + z, q_{min}, q_{max}) - z)

    with scale and zero point from the observed range (``affine_qparams``, or ``symmetric_scale``).
    The gradient is straight-through inside the range and zero outside. Until a range is known the
    input passes through unchanged.

    Args:
        spec: What is asked.

    Attributes:
        min_val: Lower end of the range, float32 scalar buffer.
        max_val: Upper end, float32 scalar buffer.
        batches: How many batches the range stands for, float32 scalar buffer; 0: no range yet.
        histogram: With ``calibration="histogram"``: counts of all batches, int64 buffer. In a
            distributed run each process adds its batch to the first one's, and the widest range of
            all counts.
        reach: The histogram's ends, float32 scalar buffer.
        observing: The range follows the data, in training mode only.
        quantizing: Fake quantization is on.
        deferred: Observations wait for ``commit``, so that the scale is the same for a whole step
            and all processes can agree on it first; otherwise each forward commits its own.
        compact: What backward keeps is small, not fast; see ``int_repr``.
    """

    SWITCHES = frozenset({"observing", "quantizing", "deferred", "compact"})

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
        if spec.calibration == "histogram":
            self.register_buffer("histogram", torch.zeros(HISTOGRAM_BINS, dtype=torch.int64))
            self.register_buffer("reach", torch.tensor(SMALLEST_REACH, dtype=torch.float32))
        self.observing = True
        self.quantizing = True
        self.deferred = False
        self.compact = False
        # Not derived from `batches` in forward: that would wait for the device at every call.
        self.calibrated = spec.clip is not None
        # Not a buffer: DistributedDataParallel would overwrite it with the first process's.
        self.pending: Tensor | None = None
        self._numbers: tuple[tuple[float, float], tuple[Tensor, Tensor]] | None = None
        self.identity = object()

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """Observe (in training), then fake-quantize; any shape, the dtype of ``x`` is kept.

        Args:
            x: What to quantize.
            saves_input: See ``fake_quantize``; for layers, whose own backward needs their input.
        """
        forward_cache = current_forward_cache()
        with hide_from_hooks():
            if forward_cache is None:
                return self._quantize(x, saves_input)
            quantize = partial(self._quantize, saves_input=saves_input)
            x = forward_cache.relu_fusion.read_by_quantizer(x, self)
            result = forward_cache.quantize(x, self.identity, quantize, skip=True)
            if result is x:
                forward_cache.relu_fusion.forget(x)
            return result

    def quantize_clamped(
        self, x: Tensor, ends: tuple[float, float]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Quantize relu, relu6 or hardtanh of ``x`` in one pass.

        Values and gradients are those of two passes to the bit.

        Args:
            x: What is to be clamped; it must not be changed in place before backward.
            ends: Of the clamp; the upper one may be infinity.

        Returns:
            The quantized tensor, and what ``observe`` shall be given if it is read. ``None`` where
            it takes two passes: on other devices than CPUs, for other dtypes than float32, and
            while more is observed of the clamped values than their range, or at once.
        """
        if not (self.quantizing and self.calibrated) or is_exporting_onnx():
            return None
        if (self.watches and not self._by_range) or not clamps(x, self.min_val):
            return None
        seen: list[Tensor] = []
        with hide_from_hooks():
            samples, observe = self.spec.samples, None
            if self.watches and x.numel():
                if samples is None:
                    observe = seen.append
                else:
                    seen.append(batch_range(x, samples, ends))
            quantized = self._clamp_and_quantize(x, ends, observe)
        return None if quantized is None else (quantized, seen[0] if seen else None)

    def _clamp_and_quantize(
        self, x: Tensor, ends: tuple[float, float], observe: Observe | None
    ) -> Tensor | None:
        numbers = self._kept_numbers()
        return clamp_and_quantize(
            x, ends, *numbers, self.grid, carries_int_repr=self.compact, observe=observe
        )

    @property
    def _by_range(self) -> bool:
        """Whether nothing but ranges is observed, and none of them counts at once."""
        return self.deferred and self.spec.calibration in BY_RANGE

    def _quantize(self, x: Tensor, saves_input: bool) -> Tensor:
        ready = self.quantizing and self.calibrated
        exporting = is_exporting_onnx()
        observe = None
        if ready and self._by_range and self.spec.samples is None:
            # In the pass that quantizes.
            observe = self.observe if self.watches and x.numel() and not exporting else None
        elif not exporting:
            self.observe_values(x)
            ready = self.quantizing and self.calibrated
        if not ready:
            return x
        if exporting:
            return quantize_dequantize(x, *self._scale_and_zero_point(), self.grid)
        return self._fake_quantize(x, saves_input, observe)

    def _fake_quantize(self, x: Tensor, saves_input: bool, observe: Observe | None) -> Tensor:
        scale, zero_point = self._kept_numbers()
        return fake_quantize(
            x,
            scale,
            zero_point,
            self.grid,
            saves_input=saves_input,
            carries_int_repr=self.compact,
            observe=observe,
        )

    @property
    def _waits(self) -> bool:
        """Whether the range still waits for data."""
        return True

    def _range_of(self, x: Tensor) -> Tensor:
        if self.spec.calibration == "histogram":
            return self._range_of_all(x)
        search, samples = SEARCHES.get(self.spec.calibration), self.spec.samples
        if search is None:
            return batch_range(x, samples)
        return search(x, self.grid, self.spec.symmetric, samples or SAMPLES)

    @torch.no_grad()
    def _range_of_all(self, x: Tensor) -> Tensor:
        """The best range for all batches so far and this one."""
        if not _in_backward():
            add_to_histogram(self.histogram, self.reach, x, self.spec.samples or SAMPLES)
        found = histogram_range(self.histogram, self.reach, self.grid, self.spec.symmetric)
        whole = batch_range(x)
        # Not finite: for the commit to refuse.
        return torch.where(torch.isfinite(whole).all(), found, whole)

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """Fake-quantize the inputs of a concatenation: one batch, one range of all of them."""
        observing = self.observing
        filled = [value for value in values if value.numel()]
        if self.watches and filled:
            with hide_from_hooks():
                self.observe(torch.stack([self._range_of(value) for value in filled]).amax(0))
        self.observing = False
        try:
            return [self(value) for value in values]
        finally:
            self.observing = observing

    def for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        """Fake quantization with the numbers of this moment, computed once; observes nothing.

        Args:
            values: How many values all calls together will quantize.
        """
        if not (self.quantizing and self.calibrated):
            return lambda x: x
        return self._for_many_calls(values)

    def _for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        return fake_quantizer(*self._kept_numbers(), self.grid)

    @property
    def watches(self) -> bool:
        """Whether what it quantizes now is observed."""
        return self.observing and self.training and self._waits

    def observe_values(self, x: Tensor) -> None:
        """Observe what a forward quantizes, if it is to be."""
        if self.watches and x.numel():
            self.observe(self._range_of(x))

    def observe(self, seen: Tensor) -> None:
        """Take note of ``(-min, max)`` of a tensor; it counts when it is committed."""
        if self.spec.clip is not None:
            return
        if not self.deferred and _in_backward():
            # Activation checkpointing runs the forward again in backward: it has been counted, and
            # its range must stay what it was.
            return
        self.pending = seen if self.pending is None else torch.maximum(self.pending, seen)
        if not self.deferred:
            self.commit(self.pending)

    @torch.no_grad()
    def commit(self, batch: Tensor) -> None:
        """Take one batch's ``(-min, max)`` into the range; the pending observation is dropped.

        Args:
            batch: ``(-min, max)``, finite, shape ``(2,)``; see ``batch_range``.
        """
        self.pending = None
        UPDATES[self.spec.calibration](self.min_val, self.max_val, batch, self.batches)
        self.batches += 1
        self.range_changed()

    def range_changed(self) -> None:
        """To be called when observations have changed the range."""
        self.calibrated = True

    @property
    def why_unknown(self) -> str:
        """What is missing for a range, where there is none."""
        return "no training batch has passed through it"

    @property
    def why_not_final(self) -> str | None:
        """Why there are no numbers to be made final, ``None`` where there are.

        Waits for the device. A loop that never calls ``commit_ranges`` learns here that a batch was
        not finite.
        """
        if not self.calibrated:
            return self.why_unknown
        if bool(torch.isfinite(self._scale_and_zero_point()[0])):
            return None
        return "its range is not finite: NaN or infinity came in, or training has diverged"

    def qparams(self) -> QParams:
        """The final numbers, on the CPU.

        Raises:
            ValueError: No range was ever observed, or it is not finite.
        """
        if not self.calibrated:
            raise ValueError(f"{self.why_unknown}, so its range is unknown")
        scale, zero_point = self._scale_and_zero_point()
        return QParams(scale.cpu(), zero_point.to("cpu", torch.int32), self.grid)

    def _kept_numbers(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point, computed once for as long as the range stays what it is.

        By its values: an average may exchange them in ways that torch cannot see. On other devices
        than CPUs looking at them would wait.
        """
        if is_compiling() or self.min_val.device.type != "cpu":
            return self._scale_and_zero_point()
        ends = self.min_val.item(), self.max_val.item()
        if self._numbers is None or self._numbers[0] != ends:
            with torch.inference_mode(False):
                self._numbers = ends, self._scale_and_zero_point()
        return self._numbers[1]

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        low, high = self.min_val, self.max_val
        if self.spec.symmetric:
            scale = symmetric_scale(torch.maximum(low.abs(), high.abs()), self._symmetric_grid)
            return scale, torch.zeros_like(scale)
        if self.spec.fixed_min:
            low = torch.zeros_like(low)
        return affine_qparams(low, high, self.grid)

    @property
    def _symmetric_grid(self) -> IntegerGrid:
        """The grid whose ends the largest value touches: -127..127 of -128..127."""
        return IntegerGrid(-self.grid.qmax, self.grid.qmax)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.calibrated = self.spec.clip is not None or bool(self.batches > 0)
        self.pending = None

    def extra_repr(self) -> str:
        """Bits and range, for ``print(model)``."""
        kind = "symmetric" if self.spec.symmetric else "affine"
        state = (
            f"range=[{float(self.min_val):.4g}, {float(self.max_val):.4g}]"
            if self.calibrated
            else "no range yet"
        )
        return f"{self.spec.bits} bits, {kind}, {state}"


def _in_backward() -> bool:
    # torch.compile traces a checkpointed forward once, and functionally.
    return not torch.compiler.is_dynamo_compiling() and torch._C._current_graph_task_id() != -1
