"""Fake quantization of activations with a range that follows the data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import current_forward_cache, hide_from_hooks
from lightning_qat.numerics.arithmetic import range_qparams
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.numerics.fake_quantize import (
    clamp_and_quantize,
    clamps,
    fake_quantize,
    fake_quantizer,
)
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import runs_kernels, suits
from lightning_qat.numerics.gpu.straight_through import quantize_on_device
from lightning_qat.numerics.min_max import Observe, batch_range
from lightning_qat.numerics.qparams import QParams
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.range_observer import RangeObserver
from lightning_qat.quantizers.torch_onnx_export import is_exporting_onnx, quantize_dequantize
from lightning_qat.recipe.specs import ActivationSpec


class ActivationQuantizer(RangeObserver):
    r"""Observes an activation in training, and fake-quantizes it per tensor.

    .. math:: y = s \cdot (\mathrm{clip}(\mathrm{round}(x / s) + z, q_{min}, q_{max}) - z)

    with scale :math:`s` and zero point :math:`z` from the observed range (``range_qparams``). The
    gradient is straight-through inside the range and zero outside (Jacob et al.,
    arXiv:1712.05877). Until a range is known the input passes through unchanged.

    A subclass with other numbers overrides ``scale_and_zero_point`` and the three functions that
    round: ``_fake_quantize``, ``_clamp_and_quantize`` and ``_for_many_calls``.

    Args:
        spec: Bits, symmetry and calibration.

    Attributes:
        quantizing: Fake quantization is on; otherwise the input passes through unchanged.
        compact: Backward keeps integers and bits, which takes less memory; see ``int_repr``.
        identity: Key of this quantizer in the cache of a forward.
    """

    SWITCHES = Quantizer.SWITCHES | {"observing", "quantizing", "deferred", "compact"}

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self.quantizing = True
        self.compact = False
        self.identity = object()

    @property
    def is_clipping(self) -> bool:
        """Whether forwards clip to the range now."""
        return self.quantizing

    @property
    def idle(self) -> bool:
        """Whether it returns its input now, and takes no note of it."""
        observes = self.is_observing and self.spec.clip is None
        return not (observes or (self.quantizing and self.calibrated))

    def count_batch(self) -> None:
        """Called once for a batch whose ranges were committed, alike on all processes."""

    def forward(self, x: Tensor, saves_input: bool = False) -> Tensor:
        """Observe (in training), then fake-quantize; any shape, the dtype of ``x`` is kept.

        Args:
            x: Real values, any floating dtype.
            saves_input: See ``fake_quantize``; for layers, whose own backward needs their input.
        """
        forward_cache = current_forward_cache()
        with hide_from_hooks():
            if forward_cache is None:
                return self._quantize(x, saves_input)
            x = forward_cache.relu_fusion.read_by_quantizer(x, self)
            # A tensor counts once, also where it must be quantized twice.
            result = forward_cache.quantize(
                x, self.identity, lambda x, new: self._quantize(x, saves_input, new), skip=True
            )
            if result is x:
                forward_cache.relu_fusion.pass_on(x)
            return result

    def quantize_clamped(
        self, x: Tensor, ends: tuple[float, float]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Quantize relu, relu6 or hardtanh of ``x`` in one pass.

        Values and gradients are those of two passes to the bit.

        Args:
            x: Real values; they must not be changed in place before backward.
            ends: Lower and upper end of the clamp; the upper one may be infinity.

        Returns:
            The quantized tensor, and the range to give to ``observe`` if the tensor is read.
            ``None`` if it takes two passes: where ``clamps`` says so, and while the calibration
            needs more than a range, or commits at once.
        """
        if not (self.quantizing and self.calibrated) or is_exporting_onnx():
            return None
        if x.device != self.min_val.device or not clamps(x, self.min_val, ends):
            return None
        if self.is_observing and not self._observes_later():
            return None
        seen: list[Tensor] = []
        with hide_from_hooks():
            samples, observe = self.spec.samples, None
            if self.is_observing and x.numel():
                if samples is None:
                    observe = seen.append
                else:
                    seen.append(batch_range(x, samples, ends))
            quantized = self._clamp_and_quantize(x, ends, observe)
        return None if quantized is None else (quantized, seen[0] if seen else None)

    def _clamp_and_quantize(
        self, x: Tensor, ends: tuple[float, float], observe: Observe | None
    ) -> Tensor | None:
        if suits(x):
            return quantize_on_device(
                x, self.device_grid(), clamp=ends, carries_int_repr=self.compact, observe=observe
            )
        numbers = self._current_qparams()
        return clamp_and_quantize(
            x, ends, *numbers, self.grid, carries_int_repr=self.compact, observe=observe
        )

    def _observes_later(self) -> bool:
        """Whether observing needs no pass of its own, and does not change this forward's range."""
        return CALIBRATIONS[self.spec.calibration].min_max_only and self.observes_later()

    def _quantize(self, x: Tensor, saves_input: bool, observes: bool = True) -> Tensor:
        if x.layout is not torch.strided or not x.is_floating_point() or x.is_nested:
            raise TypeError(_not_quantizable(x, self.place))
        if not is_compiling():
            if x.device != self.min_val.device:
                x = self._brought_here(x)
            if not (self.calibrated or self.in_training):
                self.notice_range()
        ready = self.quantizing and self.calibrated
        exporting = is_exporting_onnx()
        observe = None
        if ready and self.spec.samples is None and self._observes_later():
            # In the pass that quantizes.
            wanted = observes and self.is_observing and x.numel() and not exporting
            observe = self.observe if wanted else None
        elif not exporting and observes:
            self.observe_values(x)
            ready = self.quantizing and self.calibrated
        if not ready:
            return x
        if exporting:
            return quantize_dequantize(x, *self.scale_and_zero_point(), self.grid)
        return self._fake_quantize(x, saves_input, observe)

    def _brought_here(self, x: Tensor) -> Tensor:
        """A number of a CPU on the quantizer's device, as torch's own operations take it.

        Raises:
            RuntimeError: It is no single number.
        """
        device = self.min_val.device
        if x.dim() == 0 and x.is_cpu:
            return x.to(device)
        where = repr(self.place) if self.place else "a quantizer"
        raise RuntimeError(
            f"A tensor and its quantizer must be on one device; the input of {where} is on "
            f"{x.device}, its quantizer on {device}. Move the model after prepare: "
            f"model.to({str(x.device)!r})."
        )

    def _fake_quantize(self, x: Tensor, saves_input: bool, observe: Observe | None) -> Tensor:
        if suits(x):
            return quantize_on_device(
                x, self.device_grid(), carries_int_repr=self.compact, observe=observe
            )
        scale, zero_point, *limits = self._current_numbers()
        return fake_quantize(
            x,
            scale,
            zero_point,
            self.grid,
            saves_input=saves_input,
            carries_int_repr=self.compact,
            observe=observe,
            limits=(limits[0], limits[1]),
        )

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """Fake-quantize the inputs of a concatenation: one batch, one range of all of them."""
        if self.quantizing and self.calibrated and self._observes_later():
            # Each is observed in the pass that quantizes it, and the widest range counts.
            return [self(value) for value in values]
        observing, forward_cache = self.observing, current_forward_cache()
        new = [x for x in values if x.numel()]
        if forward_cache is not None:
            new = [x for x in new if not forward_cache.is_observed(x, self.identity)]
        if self.is_observing and new:
            with hide_from_hooks():
                self.observe(torch.stack([self.range_of(x) for x in new]).amax(0))
        self.observing = False
        try:
            return [self(value) for value in values]
        finally:
            self.observing = observing

    def for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        """A fake quantization with the present scale and zero point, for many small tensors.

        Nothing is observed.

        Args:
            values: The number of values in all calls together.
        """
        if not (self.quantizing and self.calibrated):
            return lambda x: x
        return self._for_many_calls(values)

    def _for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        if runs_kernels(self.min_val.device) and not is_compiling():
            return lambda x: self._fake_quantize(x, saves_input=True, observe=None)
        return fake_quantizer(*self._current_qparams(), self.grid)

    @property
    def why_not_final(self) -> str | None:
        """The reason why scale and zero point cannot be made final; ``None``: they can.

        Waits for the device. A loop that never calls ``commit_ranges`` learns here that a batch was
        not finite.
        """
        if not self.calibrated:
            return self.why_unknown
        scale, zero_point = self.scale_and_zero_point()
        # At the end of float32 a finite scale may still have a last step beyond it.
        ends = [(end - zero_point) * scale for end in (self.grid.qmin, self.grid.qmax)]
        if all(bool(torch.isfinite(value)) for value in (scale, *ends)):
            return None
        return "its range is not finite: NaN or infinity came in, or training has diverged"

    def qparams(self) -> QParams:
        """The final scale and zero point, on the CPU.

        Raises:
            ValueError: No range was ever observed, or it is not finite.
        """
        if not self.calibrated:
            raise ValueError(f"{self.why_unknown}, so its range is unknown")
        scale, zero_point = self.scale_and_zero_point()
        return QParams(scale.cpu(), zero_point.to("cpu", torch.int32), self.grid)

    def device_grid(self) -> DeviceGrid:
        """Where a kernel finds the range."""
        rule = GridRule.RANGE_FROM_ZERO if self.spec.fixed_min else GridRule.RANGE
        if self.spec.symmetric:
            rule = GridRule.SYMMETRIC_RANGE
        return DeviceGrid(rule, self.min_val, self.max_val, self.grid)

    def extra_repr(self) -> str:
        """Bits and range, for ``print(model)``."""
        kind = "symmetric" if self.spec.symmetric else "affine"
        state = (
            f"range=[{float(self.min_val):.4g}, {float(self.max_val):.4g}]"
            if self.calibrated
            else "no range yet"
        )
        return f"{self.spec.bits} bits, {kind}, {state}"


class ParameterQuantizer(ActivationQuantizer):
    """Quantizes the weight of a product written by hand: ``x @ self.w``, ``x @ a.T @ b.T``.

    The grid is symmetric, and the range is that of the tensor itself at every forward, as a layer's
    weight has it: nothing is averaged, nothing freezes, nothing is clipped.
    """

    SWITCHES = Quantizer.SWITCHES | {"quantizing", "compact"}

    @property
    def follows_data(self) -> bool:
        """No: it follows the parameters."""
        return False

    def quantize_clamped(self, x: Tensor, ends: tuple[float, float]) -> None:
        """Never in one pass with a relu before it: its range must be known first."""

    def _quantize(self, x: Tensor, saves_input: bool, observes: bool = True) -> Tensor:
        if is_transforming() and self.quantizing and x.numel():
            low, high = batch_range(x)
            numbers = range_qparams(-low, high, self.grid, symmetric=True)
            return fake_quantize(x, *numbers, self.grid)
        if x.numel():
            self.measure(x)
        return super()._quantize(x, saves_input, observes)

    @torch.no_grad()
    def measure(self, x: Tensor) -> None:
        """Take the range of a tensor as it is now."""
        low, high = batch_range(x)
        self.min_val.copy_(-low)
        self.max_val.copy_(high)
        self.batches.fill_(1.0)
        self.range_changed()


def _not_quantizable(x: Tensor, place: str) -> str:
    kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
    remedy = "x.to_dense()" if not x.is_nested else "x.to_padded_tensor(0.0)"
    if not x.is_floating_point():
        remedy = "torch.view_as_real(x)" if x.is_complex() else "x.float()"
    return (
        "A quantizer takes dense tensors of real floating-point numbers; "
        f"{place or 'a quantizer'!r} got a {kind} tensor of {x.dtype}. Give it {remedy}, or leave "
        "its module out of quantization by the recipe's exclude."
    )
