"""Quantizers whose grids are parameters, trained with the network."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_qat.arithmetic import MIN_SCALE, affine_qparams, symmetric_scale, zero_point_of
from lightning_qat.codes import Codes
from lightning_qat.fake_quantization import Observe
from lightning_qat.learned import (
    learned_fake_quantize,
    learned_fake_quantizer,
    least_squares_scale,
)
from lightning_qat.qparams import Grid
from lightning_qat.quantizers import ActivationQuantizer, WeightQuantizer
from lightning_qat.recipe import ActivationSpec, WeightSpec


def activation_quantizer(spec: ActivationSpec) -> ActivationQuantizer:
    """The quantizer that a spec asks for."""
    if spec.quantizer == "learned":
        return LearnedStepActivation(spec)
    return LearnedClipActivation(spec) if spec.quantizer == "ulq" else ActivationQuantizer(spec)


def weight_quantizer(spec: WeightSpec, axis: int, channels: int) -> WeightQuantizer:
    """The quantizer that a spec asks for, for a weight with so many output channels on ``axis``."""
    if spec.quantizer in ("learned", "ulq"):
        return LearnedWeightQuantizer(spec, axis, channels)
    return WeightQuantizer(spec, axis)


class _LearnedActivation(ActivationQuantizer):
    """What learned activations share: the observed range is where learning starts.

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
    def _waits(self) -> bool:
        return not (self.calibrated and self.quantizing)

    def _fake_quantize(self, x: Tensor, saves_input: bool, observe: Observe | None) -> Tensor:
        assert observe is None, "what is learned is no longer observed"
        return self._fake_quantizer(x.numel(), saves_input, self.compact)(x)

    def _clamp_and_quantize(
        self, x: Tensor, ends: tuple[float, float], observe: Observe | None
    ) -> Tensor | None:
        assert observe is None, "what is learned is no longer observed"
        if ends[0] != 0.0 or ends[1] < float(self._scale_and_zero_point()[0]):
            return None
        return self._fake_quantizer(x.numel(), True, self.compact, clamped=ends)(x)

    def _for_many_calls(self, values: int) -> Callable[[Tensor], Tensor]:
        return self._fake_quantizer(values, saves_input=True, carries_codes=False)

    def _fake_quantizer(
        self,
        values: int,
        saves_input: bool,
        carries_codes: bool,
        clamped: tuple[float, float] | None = None,
    ) -> Callable[[Tensor], Tensor]:
        low, scale = self._ends()
        return learned_fake_quantizer(
            scale,
            low,
            self.grid,
            values if self._normalized else None,
            saves_input=saves_input,
            carries_codes=carries_codes,
            clamped=clamped,
        )

    def _scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            low, scale = self._ends()
            if low is None:
                return scale, torch.zeros_like(scale)
            return scale, zero_point_of(low, scale, self.grid)

    def _ends(self) -> tuple[Tensor | None, Tensor]:
        """Lower end (``None``: symmetric) and scale, differentiable."""
        raise NotImplementedError

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

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.seen = int(self.batches)
        enough = self.seen >= self.spec.calibration_batches
        self.calibrated = self.spec.clip is not None or enough

    def _start(self, low: Tensor, high: Tensor) -> None:
        raise NotImplementedError


class LearnedStepActivation(_LearnedActivation):
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
            self.scale.copy_(symmetric_scale(largest, self._symmetric_grid))
            return
        low = torch.zeros_like(low) if self.low is None else low.clamp(max=0.0)
        self.scale.copy_(affine_qparams(low, high, self.grid)[0])
        if self.low is not None:
            self.low.copy_(low)

    def _ends(self) -> tuple[Tensor | None, Tensor]:
        low: Tensor | None = self.low
        if low is None and not self.spec.symmetric:
            low = torch.zeros_like(self.scale)
        return low, _positive(self.scale)


class LearnedClipActivation(_LearnedActivation):
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

    def _ends(self) -> tuple[Tensor | None, Tensor]:
        high = self.clip_max.clamp(min=0.0)
        if self.spec.symmetric:
            return None, symmetric_scale(high, self._symmetric_grid)
        low = torch.zeros_like(high) if self.clip_min is None else self.clip_min.clamp(max=0.0)
        return low, affine_qparams(low, high, self.grid)[0]


class LearnedWeightQuantizer(WeightQuantizer):
    """Learns the scales of a weight: LSQ, and AMCT's ULQ, which differs in the grid alone.

    Learning starts in the first training forward from the scales with the least squared error
    (``initial="mse"``) or from the largest absolute weights. A weight outside the range gets no
    gradient.

    Args:
        spec: With ``quantizer="learned"``, or ``"ulq"`` for AMCT's grid (-128..127 at 8 bits).
        axis: The output channel's axis of the weight.
        channels: The weight's size along it.

    Attributes:
        scale: Parameter, ``(channels,)`` or scalar: its absolute value is the scale.
        started: Whether ``scale`` has been set from a weight, float32 scalar buffer.
    """

    started: Tensor

    def __init__(self, spec: WeightSpec, axis: int, channels: int) -> None:
        super().__init__(spec, axis)
        if spec.quantizer == "ulq":
            self.grid = Grid.signed(spec.bits)
        shape = () if self._channel_axis is None else (channels,)
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("started", torch.tensor(0.0))
        self.ready = False

    def _fake_quantize(self, weight: Tensor, known: Tensor | Codes | None) -> Tensor:
        if self.training and not self.ready:
            self._start(weight)
        scale = _positive(self.scale) if self.ready else self._scale(weight)
        return learned_fake_quantize(
            weight,
            scale,
            None,
            self.grid,
            axis=self._channel_axis,
            saves_input=True,
            carries_codes=self.compact,
            known=known,
        )

    @torch.no_grad()
    def _start(self, weight: Tensor) -> None:
        self.scale.copy_(self._scale(weight))
        self.started.fill_(1.0)
        self.ready = True

    @torch.no_grad()
    def _scale(self, weight: Tensor) -> Tensor:
        if self.ready:
            return _positive(self.scale)
        scale = super()._scale(weight)
        if self.spec.initial == "minmax":
            return scale
        return least_squares_scale(weight, scale, self.grid, self._channel_axis)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self.ready = bool(self.started > 0)


def quantizer_parameters(
    model: nn.Module, of: Literal["weights", "activations"] | None = None
) -> list[nn.Parameter]:
    """The learned scales and range ends of a model, in the order of registration.

    Weight decay would pull them to zero; give them a group of their own in the optimizer. The
    scales of weights may have another learning rate, too: Adam's steps are as long as the rate
    whatever it is that learns, and a scale is a fraction of the weights.

        >>> from lightning_qat import prepare
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> recipe = {"weight": {"quantizer": "learned"}, "joins": False, "outputs": False}
        >>> _ = prepare(model, recipe)
        >>> scales = quantizer_parameters(model, "weights")
        >>> ranges = quantizer_parameters(model, "activations")
        >>> learned = {*scales, *ranges}
        >>> groups = [
        ...     {"params": [p for p in model.parameters() if p not in learned]},
        ...     {"params": scales, "lr": 1e-4, "weight_decay": 0.0},
        ...     {"params": ranges, "weight_decay": 0.0},
        ... ]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01)

    Args:
        model: A prepared model.
        of: Only those of weights, or of activations.

    Raises:
        ValueError: ``of`` is something else.
    """
    kinds = {"weights": (LearnedWeightQuantizer,), "activations": (_LearnedActivation,)}
    if of is not None and of not in kinds:
        raise ValueError(f"of must be 'weights', 'activations' or None; got {of!r}.")
    wanted = kinds[of] if of is not None else (_LearnedActivation, LearnedWeightQuantizer)
    return [
        p for m in model.modules() if isinstance(m, wanted) for p in m.parameters(recurse=False)
    ]


def learns(spec: ActivationSpec | WeightSpec) -> bool:
    """Whether the quantizer of a spec has parameters."""
    return spec.quantizer in ("learned", "ulq")


def _has_low(spec: ActivationSpec) -> bool:
    return not (spec.symmetric or spec.fixed_min)


def _positive(scale: Tensor) -> Tensor:
    return scale.abs().clamp(min=MIN_SCALE)
