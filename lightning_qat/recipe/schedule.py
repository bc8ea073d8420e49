"""When a run calibrates, quantizes and freezes. Without a model or a trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Milestone = int | float | None


@dataclass(frozen=True)
class Phase:
    """The behaviour of quantizers and batch norms during one training batch.

    Args:
        name: One of ``float``, ``calibrate``, ``quantize``, ``observers_frozen``,
            ``batchnorm_frozen``: the furthest thing that has happened.
        observing: Activation ranges follow the data.
        quantizing: Fake quantization is on (a quantizer without a range stays pass-through).
        batchnorm_frozen: Batch norm uses its running statistics and leaves them alone.
    """

    name: Literal["float", "calibrate", "quantize", "observers_frozen", "batchnorm_frozen"]
    observing: bool
    quantizing: bool
    batchnorm_frozen: bool

    @property
    def index(self) -> int:
        """0 for ``float`` up to 4 for ``batchnorm_frozen``: the number logged as ``qat/phase``."""
        names = ("float", "calibrate", "quantize", "observers_frozen", "batchnorm_frozen")
        return names.index(self.name)


@dataclass(frozen=True)
class Schedule:
    """The milestones of a quantization-aware run.

    A milestone is an absolute epoch (or step) when it is an ``int``, a fraction of the run when it
    is a ``float`` strictly between 0 and 1, and ``None`` for never. Epochs and steps count from 0,
    and a milestone takes effect at the start of its epoch or step.

    Args:
        calibration_batches: Training batches, from ``quantize_from`` on, that only observe: ranges
            settle before the network feels them.
        quantize_from: First epoch (step) of calibration and fake quantization; before it the
            network trains in float.
        freeze_observers: Activation ranges stop following the data.
        freeze_batchnorm: Batch norm normalises with its running statistics, as the exported file
            does, and stops updating them.
        interval: Whether milestones count epochs or optimizer steps.
        train: ``False``: only calibrate, as `Schedule.calibrate` does.
        correct_biases: With ``train=False``: take the shift of every layer's mean out afterwards.

    Raises:
        ValueError: A milestone is negative, or a float outside (0, 1). ``1.0`` is refused by name:
            it reads as "100 %" or as "epoch 1".

    Example:
        >>> milestones = Schedule(calibration_batches=2, freeze_batchnorm=None).resolve(total=10)
        >>> [milestones.phase_at(p, batches_seen=b).name for p, b in ((0, 0), (0, 2), (5, 50))]
        ['calibrate', 'quantize', 'observers_frozen']
    """

    calibration_batches: int = 8
    quantize_from: int | float = 0
    freeze_observers: int | float | None = 0.5
    freeze_batchnorm: int | float | None = 0.75
    interval: Literal["epoch", "step"] = "epoch"
    train: bool = True
    correct_biases: bool = False

    @classmethod
    def calibrate(cls, batches: int = 32, correct_biases: bool = True) -> Schedule:
        """Quantize without training: the fit runs some training batches and stops.

        ``training_step`` runs in eval mode, without gradients and without an optimizer. Learned
        scales stay where calibration leaves them.

        Args:
            batches: Training batches that give the ranges.
            correct_biases: As many batches more, on which every layer is compared with the float
                model: biases and batch norms take back what quantization shifts.

        Example:
            >>> Schedule.calibrate(16).calibration_batches
            16
        """
        return cls(
            calibration_batches=batches,
            freeze_observers=0,
            freeze_batchnorm=0,
            train=False,
            correct_biases=correct_biases,
        )

    def __post_init__(self) -> None:
        problems = []
        batches = self.calibration_batches
        if isinstance(batches, bool) or not isinstance(batches, int) or batches < 0:
            problems.append(f"calibration_batches must be 0 or more; got {batches!r}.")
        for name in ("quantize_from", "freeze_observers", "freeze_batchnorm"):
            value: Milestone = getattr(self, name)
            if value is None and name != "quantize_from":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                problems.append(f"{name} must be a number{_OR_NONE[name]}; got {value!r}.")
            elif isinstance(value, float) and not 0.0 < value < 1.0:
                whole = max(round(value), 0) if math.isfinite(value) else 0
                problems.append(
                    f"{name} must lie strictly between 0 and 1 when it is a fraction; got "
                    f"{value!r}. Write {whole} (an int) for that {self.interval}{_NEVER[name]}."
                )
            elif value < 0:
                problems.append(f"{name} must be 0 or more; got {value!r}.")
        if not self.train and batches == 0:
            problems.append(
                "calibration_batches must be 1 or more where nothing is trained; got 0."
            )
        if self.correct_biases and self.train:
            problems.append(
                "correct_biases=True needs train=False: trained biases have learned the shift. "
                "Write Schedule.calibrate()."
            )
        if self.interval not in ("epoch", "step"):
            problems.append(f"interval must be 'epoch' or 'step'; got {self.interval!r}.")
        if problems:
            raise ValueError("Schedule: " + " ".join(problems))

    @property
    def has_fractions(self) -> bool:
        """``True`` if a milestone needs the length of the run."""
        return any(isinstance(value, float) for value in self._milestones)

    def resolve(
        self, total: float, start: int = 0, steps: tuple[int, float] | None = None
    ) -> Milestones:
        """Turn fractions into epochs (steps) of a run.

        Args:
            total: Epochs (steps) of the run; ``math.inf`` when it has no end.
            start: The epoch (step) that the run begins with.
            steps: For a run of epochs that optimizer steps may end first: its first step and the
                number of all steps. A fraction is then reached by epochs or by steps.

        Returns:
            Absolute milestones; a fraction becomes ``start + ceil(fraction * (total - start))``.

        Raises:
            ValueError: A fraction is given and the run has no end.
        """
        if self.has_fractions and steps is None and not math.isfinite(total):
            raise ValueError(
                f"Schedule: fractions need a run of known length; this run has no last "
                f"{self.interval}. Give milestones as ints, or set max_epochs or max_steps."
            )
        quantize, observers, batchnorm = (_absolute(v, start, total) for v in self._milestones)
        milestones = Milestones(self.calibration_batches, quantize, observers, batchnorm)
        if steps is None:
            return milestones
        fractions = (v if isinstance(v, float) else None for v in self._milestones)
        quantize, observers, batchnorm = (_absolute(value, *steps) for value in fractions)
        return replace(milestones, by_step=Milestones(0, quantize, observers, batchnorm))

    @property
    def _milestones(self) -> tuple[Milestone, Milestone, Milestone]:
        return self.quantize_from, self.freeze_observers, self.freeze_batchnorm


def _absolute(value: Milestone, start: int, total: float) -> float:
    if value is None:
        return math.inf
    if not isinstance(value, float):
        return value
    return start + math.ceil(value * (total - start)) if math.isfinite(total) else math.inf


_OR_NONE = {"quantize_from": "", "freeze_observers": " or None", "freeze_batchnorm": " or None"}
_NEVER = {
    "quantize_from": "",
    "freeze_observers": ", None for never",
    "freeze_batchnorm": ", None for never",
}


@dataclass(frozen=True)
class Milestones:
    """A schedule with the length of the run known: absolute positions, ``inf`` for never.

    ``by_step`` are further ones, in optimizer steps, beside those in epochs: what comes first
    counts.
    """

    calibration_batches: int
    quantize_from: float
    freeze_observers: float
    freeze_batchnorm: float
    by_step: Milestones | None = None

    def going_on_from(self, phase: Phase) -> Milestones:
        """The milestones of a run that goes on from a phase: what has happened is not undone.

        Example:
            >>> frozen = Phase("observers_frozen", False, True, False)
            >>> Schedule().resolve(total=100).going_on_from(frozen).freeze_observers
            0.0
        """
        return replace(
            self,
            quantize_from=self.quantize_from if phase.name == "float" else 0.0,
            freeze_observers=(
                self.freeze_observers if phase.observing or not phase.quantizing else 0.0
            ),
            freeze_batchnorm=0.0 if phase.batchnorm_frozen else self.freeze_batchnorm,
        )

    def phase_at(self, position: int, batches_seen: int, step: int = 0) -> Phase:
        """The phase of the next training batch.

        Args:
            position: Epoch (step) that the batch belongs to, from 0.
            batches_seen: Training batches already seen since quantization was due.
            step: The optimizer steps so far, for ``by_step``.

        Returns:
            The phase. Ranges keep following the data until calibration is over, even when
            ``freeze_observers`` comes earlier: a range that was never observed is of no use.
        """
        steps = self.by_step or Milestones(0, math.inf, math.inf, math.inf)
        frozen_batchnorm = position >= self.freeze_batchnorm or step >= steps.freeze_batchnorm
        if position < self.quantize_from and step < steps.quantize_from:
            return Phase("float", False, False, frozen_batchnorm)
        if batches_seen < self.calibration_batches:
            return Phase("calibrate", True, False, frozen_batchnorm)
        # A range needs one batch at least; without a calibration phase it is this one.
        frozen = position >= self.freeze_observers or step >= steps.freeze_observers
        observing = not frozen or batches_seen == 0
        if frozen_batchnorm:
            return Phase("batchnorm_frozen", observing, True, True)
        return Phase("quantize" if observing else "observers_frozen", observing, True, False)
