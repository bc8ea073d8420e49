"""The modules that hold a tensor's range while it trains, and its numbers when they are final."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.arithmetic import (
    affine_qparams,
    along_axis,
    arq_scale,
    quantize,
    symmetric_scale,
)
from lightning_qat.codes import Codes
from lightning_qat.fake_quantization import (
    Observe,
    clamp_and_quantize,
    clamps,
    fake_quantize,
    fake_quantizer,
    quantized_again,
)
from lightning_qat.kept_weights import KeptWeights, state_of
from lightning_qat.live_onnx import is_exporting_onnx, quantize_dequantize
from lightning_qat.nodes import dequantize_node, fake_quantize_node
from lightning_qat.observers import (
    BY_RANGE,
    HISTOGRAM_BINS,
    SAMPLES,
    SEARCHES,
    SMALLEST_REACH,
    UPDATES,
    add_to_histogram,
    histogram_range,
)
from lightning_qat.qparams import Grid, QParams
from lightning_qat.ranges import batch_range, channel_ranges
from lightning_qat.recipe import ActivationSpec, WeightSpec
from lightning_qat.tape import current_tape, hidden

_Self = TypeVar("_Self", bound="Quantizer")


class Quantizer(nn.Module):
    """What both quantizers share: float32 state, and a spec that travels with the state_dict.

    Half-precision plugins cast a model's tensors; a quantizer's stay float32. A float checkpoint
    has none of a quantizer's keys and loads as it is, which leaves the quantizer as it was; a
    checkpoint with some of them must have all.
    """

    spec: Any

    def get_extra_state(self) -> dict[str, Any]:
        """The spec as primitives, so that a weights-only checkpoint can rebuild the quantizer."""
        return asdict(self.spec)

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Refuse the state of another spec: its range would mean something else.

        Raises:
            RuntimeError: The checkpoint's spec differs; every differing key is named.
        """
        # JSON and checkpoints spell tuples as lists.
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in state.items()}
        own = asdict(self.spec)
        keys = sorted(set(own) | set(stored))
        different = [
            f"{key}: checkpoint {stored.get(key)!r}, model {own.get(key)!r}"
            for key in keys
            if stored.get(key) != own.get(key)
        ]
        if different:
            raise RuntimeError(
                f"The checkpoint's {type(self.spec).__name__} differs from the model's: "
                + "; ".join(different)
                + ". Use the recipe the checkpoint was trained with."
            )

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        learned = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before.is_floating_point() and after.dtype != before.dtype:
                # Take the new device, not the new dtype; the old values, not rounded ones.
                self._buffers[name] = before.to(after.device)
        for name, before in learned.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        except RuntimeError as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


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
        compact: What backward keeps is small, not fast; see ``codes``.
    """

    min_val: Tensor
    max_val: Tensor
    batches: Tensor
    histogram: Tensor
    reach: Tensor

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__()
        self.spec: ActivationSpec = spec
        self.grid = Grid.activation(spec.bits)
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
        tape = current_tape()
        with hidden():
            if tape is None:
                return self._quantize(x, saves_input)
            quantize = partial(self._quantize, saves_input=saves_input)
            x = tape.relus.read_by(x, self)
            result = tape.quantize(x, self.identity, quantize, skip=True)
            if result is x:
                tape.relus.forget(x)
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
        with hidden():
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
            x, ends, *numbers, self.grid, carries_codes=self.compact, observe=observe
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
            carries_codes=self.compact,
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
            with hidden():
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
    def _symmetric_grid(self) -> Grid:
        """The grid whose ends the largest value touches: -127..127 of -128..127."""
        return Grid(-self.grid.qmax, self.grid.qmax)

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


class WeightQuantizer(Quantizer):
    r"""Fake-quantizes a weight with a symmetric grid whose scale follows the weight itself.

    .. math:: \hat w = s \cdot \mathrm{clip}(\mathrm{round}(w / s), q_{min}, q_{max})

    with :math:`s = \max|w| / ((q_{max} - q_{min}) / 2)` per channel or per tensor at every forward
    (AMCT's rule with ``quantizer="arq"``). The float weight is never overwritten. The gradient is
    straight-through everywhere: the range follows the weight, so nothing lies outside for long.

    Args:
        spec: What is asked.
        axis: The output channel's axis of the weight.

    Attributes:
        quantizing: Fake quantization is on; otherwise the weight passes through unchanged.
        compact: What backward keeps is small, not fast; see ``codes``.
        kept: Where quantized weights are kept for further forwards; ``None``: nowhere.
    """

    def __init__(self, spec: WeightSpec, axis: int) -> None:
        super().__init__()
        self.kept: KeptWeights | None = None
        self.spec: WeightSpec = spec
        self.axis = axis
        self.quantizing = True
        self.compact = False
        arq = spec.quantizer == "arq"
        self.grid = Grid.signed(spec.bits) if arq else Grid.weight(spec.bits)

    def forward(self, weight: Tensor) -> Tensor:
        """The fake-quantized weight, same shape and dtype."""
        if not self.quantizing:
            return weight
        if is_exporting_onnx():
            return self._exported(weight)
        with hidden():
            if self.kept is None or is_compiling():
                return self._fake_quantize(weight, None)
            state = self.compact, state_of(weight, *self.parameters())
            known = self.kept.get(self, state)
            quantized = self._fake_quantize(weight, known)
            if known is None:
                self.kept.put(self, state, quantized)
            return quantized

    def _fake_quantize(self, weight: Tensor, known: Tensor | Codes | None) -> Tensor:
        """Quantize the weight; ``known``: how that came out in an earlier forward."""
        if known is not None:
            return quantized_again(weight, known)
        scale = along_axis(self._scale(weight), weight.dim(), self._channel_axis)
        zero_point = scale.new_zeros(())
        return fake_quantize(
            weight,
            scale,
            zero_point,
            self.grid,
            gradient_everywhere=True,
            carries_codes=self.compact,
        )

    def _exported(self, weight: Tensor) -> Tensor:
        with hidden():
            scale = self._scale(weight)
            zero_point = torch.zeros_like(scale)
            return quantize_dequantize(weight, scale, zero_point, self.grid, self._channel_axis)

    def qparams(self, weight: Tensor) -> QParams:
        """The final numbers for a weight, on the CPU."""
        scale = self._scale(weight).cpu()
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        return QParams(scale, zero_point, self.grid, self._channel_axis)

    def has_finite_scale(self, weight: Tensor) -> bool:
        """Whether there are numbers to be made final; waits for the device."""
        return bool(torch.isfinite(self._scale(weight)).all())

    @property
    def _channel_axis(self) -> int | None:
        return self.axis if self.spec.granularity == "per_channel" else None

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor:
        low, high = channel_ranges(weight.to(torch.float32), self._channel_axis)
        if self.spec.quantizer == "arq":
            return arq_scale(low, high, self.grid)
        return symmetric_scale(torch.maximum(low.abs(), high.abs()), self.grid)

    def extra_repr(self) -> str:
        """Bits and granularity, for ``print(model)``."""
        return f"{self.spec.bits} bits, {self.spec.granularity}, {self.spec.quantizer}"


class FinalActivation(nn.Module):
    """An activation's numbers, final: one explicit ``lightning_qat::fake_quantize`` node.

    Args:
        qparams: The numbers, per tensor.
        key: Name of the tensor in the table of the converted model, such as ``net.conv1.input``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, key: str) -> None:
        super().__init__()
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())
        self.grid, self.key = qparams.grid, key
        # torch.export hands modules out behind proxies, so the module's own identity varies.
        self.identity = object()

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """Fake-quantize ``x``; one node per tensor, however many consumers it has."""
        tape = current_tape()
        if tape is None:
            return self._quantize(x)
        with hidden():
            return tape.quantize(x, self.identity, self._quantize, skip=False)

    def _quantize(self, x: Tensor) -> Tensor:
        result: Tensor = fake_quantize_node(
            x, self.scale, self.zero_point, self.grid.qmin, self.grid.qmax, self.key
        )
        return result


class FinalWeight(nn.Module):
    """A weight's integers and numbers, final: one explicit ``lightning_qat::dequantize`` node.

    Args:
        integers: The weight on the grid.
        qparams: The numbers.
        key: Name of the tensor in the table of the converted model, such as ``net.conv1.weight``.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, integers: Tensor, qparams: QParams, key: str) -> None:
        super().__init__()
        self.register_buffer("integers", integers)
        self.register_buffer("scale", qparams.scale.clone())
        self.grid, self.axis, self.key = qparams.grid, qparams.axis, key

    @classmethod
    def from_weight(cls, weight: Tensor, qparams: QParams, key: str) -> FinalWeight:
        """Round a float weight once and for all."""
        weight = weight.detach().to("cpu", torch.float32)
        scale = along_axis(qparams.scale, weight.dim(), qparams.axis)
        zero_point = torch.zeros((), dtype=torch.int32)
        return cls(quantize(weight, scale, zero_point, qparams.grid), qparams, key)

    def forward(self, weight: Tensor | None) -> Tensor:
        """The real value of the integers; the float weight is gone and ignored."""
        result: Tensor = dequantize_node(
            self.integers, self.scale, self.grid.qmin, self.grid.qmax, self.axis, self.key
        )
        return result
