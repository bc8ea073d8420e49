"""Which phase of its schedule a run is in. Knows no trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_qat.recipe.schedule import Milestones, Phase, Schedule

DESCRIPTIONS = {
    "float": "training in float",
    "calibrate": "observing activation ranges, not quantizing yet",
    "quantize": "fake quantization on, observed ranges follow the data",
    "observers_frozen": "observed activation ranges frozen",
    "batchnorm_frozen": "batch norm statistics frozen",
}
"""Name of each phase to the words for it on the console."""


class PhaseTracker:
    """Counts the batches of a run and derives its phase from the schedule.

    Args:
        schedule: The schedule of the run.

    Attributes:
        phase: The phase of the current training batch; ``None`` before the first one.
        batches_seen: Training batches so far, without those that trained in float.
        start: The epoch and the step that the run began with; ``None`` before it does. Fractions of
            the run count from there, which matters after a float checkpoint.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self.start_anew()

    def start_anew(self) -> None:
        """Forget everything: a run that begins at step 0 inherits nothing from an earlier one."""
        self._milestones: Milestones | None = None
        self.phase: Phase | None = None
        self.batches_seen = 0
        self.start: tuple[int, int] | None = None

    def set_milestones(self, milestones: Milestones) -> None:
        """Set the milestones of this run; after a resume, what has happened is not undone."""
        if self.phase is not None:
            milestones = milestones.going_on_from(self.phase)
        self._milestones = milestones

    def leave_phase(self) -> None:
        """Forget the phase, so that the next batch enters one."""
        self.phase = None

    def enter_phase(self, epoch: int, step: int) -> Phase:
        """Enter the phase of the next training batch, and return it.

        Args:
            epoch: The epoch of the batch, from 0.
            step: The optimizer steps so far.
        """
        assert self._milestones is not None
        position = epoch if self._schedule.interval == "epoch" else step
        self.phase = self._milestones.phase_at(position, self.batches_seen, step)
        return self.phase

    def count_batch(self) -> None:
        """Count a training batch that has ended."""
        if self.phase is not None and self.phase.name != "float":
            self.batches_seen += 1

    def never_quantized(self) -> str | None:
        """A message if training ends in a phase that does not quantize, else ``None``."""
        if self.phase is None or self.phase.quantizing:
            return None
        if not self._schedule.train:
            return (
                f"the run ended after {self.batches_seen} of {self._schedule.calibration_batches} "
                "calibration batches: ranges are those of the batches so far, and no bias was "
                "corrected. Raise max_epochs, or calibrate on fewer batches."
            )
        return (
            f"training ended in phase {self.phase.name!r} after {self.batches_seen} of "
            f"{self._schedule.calibration_batches} calibration batches; the network never "
            "trained quantized. Train longer, or lower Schedule.quantize_from or "
            "calibration_batches."
        )

    def state_dict(self) -> dict[str, Any]:
        """The phase and the number of batches, as primitives."""
        return {
            "phase": None if self.phase is None else asdict(self.phase),
            "batches_seen": self.batches_seen,
            **({"start": list(self.start)} if self.start and any(self.start) else {}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state: calibration continues, and what was frozen stays frozen."""
        # A state of the recipe alone says nothing of a phase: calibration begins.
        self.batches_seen = int(state.get("batches_seen", 0))
        # A checkpoint of an earlier version has none: it counts from the first epoch.
        epoch, step = state.get("start", (0, 0))
        self.start = int(epoch), int(step)
        phase = state.get("phase")
        self.phase = None if phase is None else Phase(**phase)
