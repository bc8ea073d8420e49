"""The specs of a weight, an activation and a layer: frozen values, checked when made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args, get_type_hints

from lightning_qat.recipe.checks import (
    choice_problem,
    flag_problem,
    is_int,
    is_number,
    refuse,
    shown,
)
from lightning_qat.recipe.typed_dicts import (
    ActivationQuantizerName,
    Calibration,
    Granularity,
    Initial,
    WeightQuantizerName,
)

_FLOAT32_MAX, _FLOAT32_TINY = 3.4028234663852886e38, 1.1754943508222875e-38


def _clip_problem(clip: Any, levels: int) -> str | None:
    """A message if a value is no range that a grid of so many steps can cover in float32."""
    rule = (
        "ActivationSpec.clip must be (low, high) with low <= 0 <= high and low < high, both "
        f"finite, so that real zero is on the grid; got {shown(clip)}"
    )
    try:
        low, high = clip
    except (TypeError, ValueError):
        return rule
    if not (is_number(low) and is_number(high)):
        return rule
    if not (-math.inf < low <= 0 <= high < math.inf and low < high):
        return rule
    if max(-low, high) > _FLOAT32_MAX or float(high) - float(low) > _FLOAT32_MAX:
        return f"ActivationSpec.clip must be a range of float32; got {shown(clip)}"
    if (float(high) - float(low)) / levels < _FLOAT32_TINY:
        return (
            "ActivationSpec.clip must be wide enough for a scale that is a normal float32; got "
            f"{shown(clip)}"
        )
    return None


@lru_cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _choice_problems(spec: WeightSpec | ActivationSpec) -> Iterator[str | None]:
    kind: Any = type(spec)
    for name, hint in _hints(kind).items():
        choices, value, where = get_args(hint), getattr(spec, name), f"{kind.__name__}.{name}"
        if hint is bool:
            yield flag_problem(where, value)
        elif choices and all(isinstance(c, str) for c in choices):
            yield choice_problem(where, value, choices)


@dataclass(frozen=True)
class WeightSpec:
    """How weights are quantized: symmetric, zero point 0.

    Args:
        bits: 2 to 8. Eight bits use -127..127, fewer bits the full range (4 bits: -8..7).
        granularity: One scale per output channel, or one per tensor.
        quantizer: ``minmax`` takes the scale from the largest absolute weight of every forward;
            ``arq`` is the same by AMCT's rule (-128..127, the farther side touches its end);
            ``learned`` trains the scales with the network (LSQ); ``ulq`` does on AMCT's grid.
        initial: Where learned scales start: ``mse``, the least squared error, or ``minmax``.

    Raises:
        ValueError: A value is outside what is listed.
    """

    bits: int = 8
    granularity: Granularity = "per_channel"
    quantizer: WeightQuantizerName = "minmax"
    initial: Initial = "mse"

    def __post_init__(self) -> None:
        problems = [*_choice_problems(self)]
        if not is_int(self.bits) or not 2 <= self.bits <= 8:
            problems.append(f"WeightSpec.bits must be an int from 2 to 8; got {shown(self.bits)}")
        refuse(*problems)


@dataclass(frozen=True)
class ActivationSpec:
    """How activations are quantized, per tensor.

    Args:
        bits: 2 to 8, or 16.
        symmetric: Zero point 0 and the same reach on both sides; affine otherwise. 16 bits must be
            symmetric.
        quantizer: ``observed``: the range follows the data by ``calibration`` until it is frozen.
            ``learned``: the step, and the lower end of an affine range, are trained with the
            network (LSQ, LSQ+), from where calibration leaves them. ``ulq``: both ends are trained,
            with AMCT's gradients, which are not normalised. ``weight``: the range is that of the
            tensor at every forward; plans give it to operands that depend on parameters alone.
        calibration: ``moving_average`` of each batch's minimum and maximum (a plain mean over the
            first 100 batches, then weight 0.01 for the newest), or the ``minmax`` over all batches;
            or the moving average of each batch's ``percentile`` (99.99 %), of its range with the
            least squared error (``mse``) or with most of its information (``entropy``); or
            ``histogram``, the range with the least squared error over all batches together. While
            values are quantized, a batch that is wider than its average widens it at once.
        fixed_min: ``True`` pins the lower end at 0, for inputs that are never negative; otherwise
            the data decide.
        clip: A given range ``(low, high)``, used from the start and never observed; learned
            quantizers start there.
        calibration_batches: How many batches give a learned quantizer the range it starts from,
            where no ``Schedule`` asks for more; from the last of them on it quantizes.
        samples: How many values of a tensor calibration looks at, 64 or more. ``None``: all of them
            for ``moving_average`` and ``minmax``, 32,768 evenly spaced ones for the others. With
            fewer than all, the first two take evenly spaced runs of 64 neighbours: values that are
            farther out than those may be clipped, and NaN or infinity may go unseen.

    Raises:
        ValueError: A value is outside what is listed, or two of them exclude each other.
    """

    bits: int = 8
    symmetric: bool = False
    quantizer: ActivationQuantizerName = "observed"
    calibration: Calibration = "moving_average"
    fixed_min: bool | None = None
    clip: tuple[float, float] | None = None
    calibration_batches: int = 1
    samples: int | None = None

    def __post_init__(self) -> None:
        problems = [*_choice_problems(self)]
        if not is_int(self.bits) or (self.bits != 16 and not 2 <= self.bits <= 8):
            problems.append(
                f"ActivationSpec.bits must be an int from 2 to 8, or 16; got {shown(self.bits)}"
            )
        if self.bits == 16 and not self.symmetric:
            problems.append(
                "ActivationSpec: 16-bit activations are symmetric on every target; set "
                "symmetric=True"
            )
        if self.fixed_min and self.symmetric:
            problems.append(
                "ActivationSpec: fixed_min pins the lower end at 0, which a symmetric range "
                "cannot have; drop one of the two"
            )
        if self.fixed_min is not None and not isinstance(self.fixed_min, bool):
            problems.append(
                f"ActivationSpec.fixed_min must be true, false or null; got {shown(self.fixed_min)}"
            )
        if not is_int(self.calibration_batches) or self.calibration_batches < 1:
            problems.append(
                "ActivationSpec.calibration_batches must be an int of 1 or more; got "
                f"{shown(self.calibration_batches)}"
            )
        if self.samples is not None and not (is_int(self.samples) and self.samples >= 64):
            problems.append(
                "ActivationSpec.samples must be an int of 64 or more, or null for what the "
                f"calibration takes by itself; got {shown(self.samples)}"
            )
        if self.clip is not None:
            levels = 2**self.bits - 1 if is_int(self.bits) and 0 < self.bits <= 16 else 1
            problem = _clip_problem(self.clip, levels)
            problems.append(problem)
            if problem is None:
                low, high = self.clip
                object.__setattr__(self, "clip", (float(low), float(high)))
        refuse(*problems)


@dataclass(frozen=True)
class LayerSpec:
    """The two specs of one layer."""

    weight: WeightSpec
    activation: ActivationSpec
