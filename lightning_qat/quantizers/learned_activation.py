"""Activation quantizers whose range is a matter of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.model.torch_private import is_in_backward
from lightning_qat.numerics.arithmetic import affine_qparams, symmetric_scale, zero_point_of
from lightning_qat.numerics.calibration.clipping import too_narrow
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import runs_kernels, suits
from lightning_qat.numerics.gpu.learned import learned_fake_quantize as learned_on_device
from lightning_qat.numerics.learned_fake_quantize import (
    gradient_factor,
    half_width_of_step,
    learned_fake_quantizer,
    step_of_half_width,
)
from lightning_qat.numerics.min_max import Observe, batch_range
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.recipe.specs import ActivationSpec

LOOKS_EVERY = 16
"""A learned range is compared with every so many batches, and with each of the first ones."""


class LearnedActivation(ActivationQuantizer):
    """Base class of learned activations: learning starts from the observed range.

    The range is observed until fake quantization begins: during the calibration phase of a
    schedule, and in the first ``calibration_batches`` training batches. From then on it is a matter
    of gradients: what was learned is never calibrated again. But a range that clips too much of a
    batch (``too_narrow``), which gradients would widen by steps of the learning rate while nothing
    comes back through what is clipped, is widened to that batch at once, while ranges are observed:
    not a range that was given (``clip``), nor parameters that do not require gradients. Looking at
    a batch takes a pass of its own, so 15 of 16 batches are not looked at.

    Attributes:
        seen: The number of training batches; while it learns, ``batches`` has it in a state_dict.
        looking: Whether the next batch is compared with the range.
    """

    _normalized: ClassVar[bool] = True
    """Whether gradients are divided by how many values share them."""

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        # Not derived from `batches`: that would wait for the device at every commit.
        self.seen = 0
        self.looking = True
        # Not buffers: DistributedDataParallel would overwrite them with the first process's.
        self._wished: Tensor | None = None
        self._observed_version = -1

    @property
    def is_learning(self) -> bool:
        """Whether the range is a matter of gradients by now."""
        return self.calibrated and self.quantizing

    @property
    def follows_data(self) -> bool:
        """Until learning starts, and then in the batches that are looked at."""
        if not self.is_learning:
            return True
        if not self.looking or self.spec.clip is not None or is_transforming():
            return False
        # A compiled forward that commits for itself would have to count.
        counts = self.deferred or not is_compiling()
        return counts and self._first_parameter().requires_grad

    @property
    def follows_range(self) -> bool:
        """No: they are parameters."""
        return False

    @property
    def learns_from_range(self) -> bool:
        """Until learning starts."""
        return self.pending is not None and not self.is_learning

    def count_batch(self) -> None:
        """Count a batch in which the range was learned; for whoever commits ranges."""
        if self.is_learning:
            self._count_to(self.seen + 1)

    def _count_to(self, seen: int) -> None:
        # A bool beside the number: torch.compile would compile anew for every number.
        self.seen = seen
        self.looking = seen < LOOKS_EVERY or seen % LOOKS_EVERY == 0

    def range_of(self, x: Tensor) -> Tensor:
        """The range of a tensor for which the learned one is too narrow; else minus infinity."""
        if not self.is_learning:
            return super().range_of(x)
        self._widen_after_step()
        low, high = self._ends()
        narrow = too_narrow(x, torch.stack((-low, high)), self.grid)
        return torch.where(narrow, batch_range(x), -torch.inf)

    def observe(self, batch: Tensor) -> None:
        """Note what ``range_of`` found."""
        if not self.is_learning or is_in_backward():
            super().observe(batch)
            return
        # Backward needs the parameters of this forward; torch.compile knows no versions.
        self._observed_version = -1 if is_compiling() else self._parameter_version()
        if self.deferred:
            super().observe(batch)
        else:
            self._wish(batch)
            self.count_batch()

    @torch.no_grad()
    def commit(self, batch: Tensor) -> None:
        """Take one batch into the range; see ``RangeObserver.commit``, and ``widen``."""
        if self.is_learning:
            self.pending = None
            self._wish(batch)
        else:
            super().commit(batch)

    def _wish(self, batch: Tensor) -> None:
        """Widen to ``(-min, max)``, now or after the optimizer's next step."""
        wished = self._wished
        self._wished = batch if wished is None else torch.maximum(wished, batch)
        self._widen_after_step()

    def _widen_after_step(self) -> None:
        """Widen to what is wished if the graph that needs the parameters is gone.

        It is when the optimizer has changed them since.
        """
        if self._wished is None or is_compiling() or is_transforming():
            return
        if self._parameter_version() != self._observed_version:
            wished, self._wished = self._wished, None
            self.widen(wished)

    def _parameter_version(self) -> int:
        return self._first_parameter()._version

    def _first_parameter(self) -> nn.Parameter:
        return next(iter(self.parameters(recurse=False)))

    @torch.no_grad()
    def widen(self, batch: Tensor) -> None:
        """Widen the learned range to ``(-min, max)``, if that is wider."""
        low, high = self._ends()
        wider = (-batch[0] < low) | (batch[1] > high)
        known = [p.clone() for p in self.parameters(recurse=False)]
        self._start(torch.minimum(low, -batch[0]), torch.maximum(high, batch[1]))
        for parameter, before in zip(self.parameters(recurse=False), known, strict=True):
            parameter.copy_(torch.where(wider, parameter, before))

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number of the grid."""
        scale, zero_point = self.scale_and_zero_point()
        return (self.grid.qmin - zero_point) * scale, (self.grid.qmax - zero_point) * scale

    def _observes_later(self) -> bool:
        """Looking at a batch takes a pass of its own."""
        return not self.is_learning and super()._observes_later()

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
        if self.in_training and not is_compiling():
            self._widen_after_step()
            if not (self.deferred or self.looking):
                self.count_batch()
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
        self._count_to(0)
        self._wished = None

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

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._widen_after_step()
        if self.is_learning:
            self.batches.fill_(self.seen)
        super()._save_to_state_dict(*args, **kwargs)

    def _has_range(self) -> bool:
        self._count_to(int(self.batches))
        return self.spec.clip is not None or self.seen >= self.spec.calibration_batches

    def _start(self, low: Tensor, high: Tensor) -> None:
        raise NotImplementedError


class LearnedStepActivation(LearnedActivation):
    r"""Learns the step of an activation's grid (LSQ) and, where it is affine, its lower end (LSQ+).

    The zero point follows from the lower end and is an integer, so that real zero stays on the grid
    and every target can store it; see ``learned_fake_quantize`` for the gradients.

    The parameter is the step times half the number of integers: half of the range. Adam's steps are
    as long as the learning rate, which is more than a whole step of 8 bits, but little of a range.
    Its gradient is that of the step; see ``step_of_half_width``.

    Args:
        spec: With ``quantizer="learned"``; ``clip`` is the range that learning starts from.

    Attributes:
        half_width: Parameter, scalar: its absolute value is ``2 ** (bits - 1)`` steps.
        low: Parameter, scalar: lower end of the range; ``None`` when it is symmetric or
            ``fixed_min`` pins it at 0.
    """

    def __init__(self, spec: ActivationSpec) -> None:
        super().__init__(spec)
        self.half_width = nn.Parameter(torch.ones(()))
        self.low = nn.Parameter(torch.zeros(())) if _has_low(spec) else None
        if spec.clip is not None:
            self._start(self.min_val, self.max_val)

    @torch.no_grad()
    def _start(self, low: Tensor, high: Tensor) -> None:
        if self.spec.symmetric:
            largest = torch.maximum(low.abs(), high.abs())
            self.start_from_step(symmetric_scale(largest, self.grid.symmetric))
            return
        low = torch.zeros_like(low) if self.low is None else low.clamp(max=0.0)
        self.start_from_step(affine_qparams(low, high, self.grid)[0])
        if self.low is not None:
            self.low.copy_(low)

    @torch.no_grad()
    def start_from_step(self, scale: Tensor) -> None:
        """Let the step be a scale, to the bit."""
        self.half_width.copy_(half_width_of_step(scale, self.grid))

    def device_grid(self) -> DeviceGrid:
        """Where a kernel finds the parameters."""
        width = self.half_width
        if self.low is not None:
            return DeviceGrid(GridRule.HALF_WIDTH_AND_LOW, width, self.low, self.grid)
        rule = GridRule.HALF_WIDTH if self.spec.symmetric else GridRule.HALF_WIDTH_FROM_ZERO
        return DeviceGrid(rule, width, width, self.grid)

    def _low_and_scale(self) -> tuple[Tensor | None, Tensor]:
        low: Tensor | None = self.low
        if low is None and not self.spec.symmetric:
            low = torch.zeros_like(self.half_width)
        return low, step_of_half_width(self.half_width, self.grid)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: Any, prefix: str, *args: Any
    ) -> None:
        stored = state_dict.pop(f"{prefix}scale", None)
        if isinstance(stored, Tensor):
            # Earlier versions learned the step itself.
            state_dict[f"{prefix}half_width"] = stored * self.grid.half_count
        super()._load_from_state_dict(state_dict, prefix, *args)


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
