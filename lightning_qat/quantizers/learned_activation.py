"""Activation quantizers whose scale and range ends are parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.numerics.arithmetic import affine_qparams, symmetric_scale, zero_point_of
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import runs_kernels, suits
from lightning_qat.numerics.gpu.learned import learned_fake_quantize as learned_on_device
from lightning_qat.numerics.learned_fake_quantize import gradient_factor, learned_fake_quantizer
from lightning_qat.numerics.min_max import Observe
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.learned_weight import positive_scale
from lightning_qat.recipe.specs import ActivationSpec


class LearnedActivation(ActivationQuantizer):
    """Base class of learned activations: learning starts from the observed range.

    The range is observed until fake quantization begins: during the calibration phase of a
    schedule, and in the first ``calibration_batches`` training batches. From then on it is a matter
    of gradients: what was learned is never calibrated again.
    """

    _normalized: ClassVar[bool] = True
    """Whether gradients are divided by how many values share them."""

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        # Not derived from `batches`: that would wait for the device at every commit.
        self.seen = 0

    @property
    def follows_data(self) -> bool:
        """Until learning starts."""
        return not (self.calibrated and self.quantizing)

    @property
    def follows_range(self) -> bool:
        """No: they are parameters."""
        return False

    @property
    def learns_from_range(self) -> bool:
        """Until learning starts."""
        return self.pending is not None

    # What is fake-quantized here no longer follows the data, so ``observe`` is None.

    def _fake_quantize(self, x: Tensor, saves_input: bool, observe: Observe | None) -> Tensor:
        return self._fake_quantizer(x.numel(), saves_input, self.compact)(x)

    def _clamp_and_quantize(
        self, x: Tensor, ends: tuple[float, float], observe: Observe | None
    ) -> Tensor | None:
        if ends[0] != 0.0:
            return None
        if not suits(x) and ends[1] < float(self.scale_and_zero_point()[0]):
            return None
        return self._fake_quantizer(x.numel(), True, self.compact, clamped=ends)(x)

    def _for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        return self._fake_quantizer(values, saves_input=True, carries_int_repr=False)

    def _fake_quantizer(
        self,
        values: int,
        saves_input: bool,
        carries_int_repr: bool,
        clamped: tuple[float, float] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        if not runs_kernels(self.min_val.device) or is_compiling():
            return self._by_autograd(values, saves_input, carries_int_repr, clamped)
        symmetric, factor = self.spec.symmetric, 1.0
        if self._normalized:
            factor = gradient_factor(values, self.grid, has_low=not symmetric)

        def call(x: Tensor) -> Tensor:
            if not suits(x):
                return self._by_autograd(values, saves_input, carries_int_repr, clamped)(x)
            return learned_on_device(
                x,
                self.device_grid(),
                factor,
                clamped=clamped,
                saves_input=saves_input,
                carries_int_repr=carries_int_repr,
            )

        return call

    def _by_autograd(
        self,
        values: int,
        saves_input: bool,
        carries_int_repr: bool,
        clamped: tuple[float, float] | None,
    ) -> Callable[[Tensor], Tensor]:
        low, scale = self._low_and_scale()
        return learned_fake_quantizer(
            scale,
            low,
            self.grid,
            values if self._normalized else None,
            saves_input=saves_input,
            carries_int_repr=carries_int_repr,
            clamped=clamped,
        )

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the learned parameters, without a gradient."""
        with torch.no_grad():
            low, scale = self._low_and_scale()
            if low is None:
                return scale, torch.zeros_like(scale)
            return scale, zero_point_of(low, scale, self.grid)

    def device_grid(self) -> DeviceGrid:
        """Where a kernel finds the parameters."""
        raise NotImplementedError

    def _low_and_scale(self) -> tuple[Tensor | None, Tensor]:
        """Lower end of the range (real; ``None``: symmetric) and scale, differentiable."""
        raise NotImplementedError

    def forget_range(self) -> None:
        """Forget what was learned, too: the next batches start it anew."""
        super().forget_range()
        self.seen = 0

    def range_changed(self) -> None:
        """Start learning from the range, once enough batches have given it."""
        self.seen += 1
        self.calibrated = self.seen >= self.spec.calibration_batches
        self._start(self.min_val, self.max_val)

    @property
    def why_unknown(self) -> str:
        """How many batches are missing."""
        wanted = self.spec.calibration_batches
        if not self.seen or self.calibrated:
            return super().why_unknown
        return f"only {self.seen} of {wanted} calibration batches have passed through it"

    def _has_range(self) -> bool:
        self.seen = int(self.batches)
        return self.spec.clip is not None or self.seen >= self.spec.calibration_batches

    def _start(self, low: Tensor, high: Tensor) -> None:
        raise NotImplementedError


class LearnedStepActivation(LearnedActivation):
    r"""Learns the step of an activation's grid (LSQ) and, where it is affine, its lower end (LSQ+).

    The zero point follows from the lower end and is an integer, so that real zero stays on the grid
    and every target can store it; see ``learned_fake_quantize`` for the gradients.

    Args:
        spec: With ``quantizer="learned"``; ``clip`` is the range that learning starts from.

    Attributes:
        scale: Parameter, scalar: its absolute value is the step.
        low: Parameter, scalar: lower end of the range; ``None`` when it is symmetric or
            ``fixed_min`` pins it at 0.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(()))
        self.low = nn.Parameter(torch.zeros(())) if _has_low(spec) else None
        if spec.clip is not None:
            self._start(self.min_val, self.max_val)

    @torch.no_grad()
    def _start(self, low: Tensor, high: Tensor) -> None:
        if self.spec.symmetric:
            largest = torch.maximum(low.abs(), high.abs())
            self.scale.copy_(symmetric_scale(largest, self.grid.symmetric))
            return
        low = torch.zeros_like(low) if self.low is None else low.clamp(max=0.0)
        self.scale.copy_(affine_qparams(low, high, self.grid)[0])
        if self.low is not None:
            self.low.copy_(low)

    def device_grid(self) -> DeviceGrid:
        """Where a kernel finds the parameters."""
        if self.low is not None:
            return DeviceGrid(GridRule.STEP_AND_LOW, self.scale, self.low, self.grid)
        rule = GridRule.STEP if self.spec.symmetric else GridRule.STEP_FROM_ZERO
        return DeviceGrid(rule, self.scale, self.scale, self.grid)

    def _low_and_scale(self) -> tuple[Tensor | None, Tensor]:
        low: Tensor | None = self.low
        if low is None and not self.spec.symmetric:
            low = torch.zeros_like(self.scale)
        return low, positive_scale(self.scale)


class LearnedClipActivation(LearnedActivation):
    """Learns the two ends of an activation's range, as AMCT's ULQ does, with its own gradients.

    ``scale = (clip_max - clip_min) / (qmax - qmin)``. The gradients are not normalised: a learning
    rate that suits weights may be too large for a clip that many values share. Source: AMCT's
    retrain algorithm ``ulq_quantize``.

    Args:
        spec: With ``quantizer="ulq"``; ``clip`` is the range that learning starts from.

    Attributes:
        clip_max: Parameter, scalar.
        clip_min: Parameter, scalar; ``None`` when the range is symmetric or ``fixed_min`` pins it.
    """

    _normalized = False

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self.clip_max = nn.Parameter(torch.ones(()))
        self.clip_min = nn.Parameter(torch.zeros(())) if _has_low(spec) else None
        if spec.clip is not None:
            self._start(self.min_val, self.max_val)

    @torch.no_grad()
    def _start(self, low: Tensor, high: Tensor) -> None:
        largest = torch.maximum(low.abs(), high.abs()) if self.spec.symmetric else high
        self.clip_max.copy_(largest.clamp(min=0.0))
        if self.clip_min is not None:
            self.clip_min.copy_(low.clamp(max=0.0))

    def device_grid(self) -> DeviceGrid:
        """Where a kernel finds the parameters."""
        if self.clip_min is not None:
            return DeviceGrid(GridRule.RANGE, self.clip_min, self.clip_max, self.grid)
        rule = GridRule.SYMMETRIC_CLIP if self.spec.symmetric else GridRule.RANGE_FROM_ZERO
        return DeviceGrid(rule, self.clip_max, self.clip_max, self.grid)

    def _low_and_scale(self) -> tuple[Tensor | None, Tensor]:
        high = self.clip_max.clamp(min=0.0)
        if self.spec.symmetric:
            return None, symmetric_scale(high, self.grid.symmetric)
        low = torch.zeros_like(high) if self.clip_min is None else self.clip_min.clamp(max=0.0)
        return low, affine_qparams(low, high, self.grid)[0]


def _has_low(spec: ActivationSpec) -> bool:
    return not (spec.symmetric or spec.fixed_min)
