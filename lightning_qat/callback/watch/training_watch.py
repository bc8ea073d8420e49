"""Watches a run for what it can tell of itself, on the first process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_qat.callback.console import say
from lightning_qat.callback.watch.losses import LossWatch, Problem
from lightning_qat.callback.watch.ranges import range_problems
from lightning_qat.training.step_statistics import StepStatistics

_LOOKS = ("calibrate", "quantize", "observers_frozen")
"""Phases in whose first batch the quantizers are looked at."""


class TrainingWatch:
    """Says one line about each thing that goes wrong, once in a run."""

    def __init__(self) -> None:
        self._losses = LossWatch()
        self._looks: StepStatistics | None = None
        self._due = False
        self._said: set[str] = set()

    def enter(self, phase: str) -> None:
        """A phase begins with the next batch."""
        self._say(self._losses.enter(phase))
        self._due = phase in _LOOKS

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a batch."""
        if self._due and trainer.is_global_zero:
            self._looks = StepStatistics(pl_module, weights=False, observed=True)
        self._due = False

    def finish(self, pl_module: LightningModule, outputs: Any) -> None:
        """After a batch."""
        looks, self._looks = self._looks, None
        if looks is not None:
            self._say(range_problems(pl_module, looks.finish()))
        self._say(self._losses.add(outputs))

    def cancel(self) -> None:
        """Take the hooks off after a batch that did not end."""
        if self._looks is not None:
            self._looks.cancel()
        self._looks = None

    def _say(self, problems: Iterable[Problem]) -> None:
        for kind, message in problems:
            if kind not in self._said:
                self._said.add(kind)
                say(f"warning: {message}.")
