"""A loss that rises: too high a learning rate, a phase that begins too early, divergence."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

WINDOW = 20
"""Batches whose median loss is compared; the device is waited for once in so many."""
_FIRST, _LAST = 3, 4
"""Batches at both ends of the calibration, which is short."""

Problem = tuple[str, str]
"""What is wrong in a word, and a message."""

_REMEDIES = {
    "quantize": (
        "Lower the learning rate, give the first and last layer 8 bits (Recipe.first_last), or ask "
        "`lightning-qat sensitivity` which layers cost most"
    ),
    "observers_frozen": "Freeze later: Schedule(freeze_observers=0.75)",
    "batchnorm_frozen": "Freeze later, or never: Schedule(freeze_batchnorm=None)",
}


class LossWatch:
    """Compares the losses of a run with those before; knows no trainer.

    A loss has risen when its median over ``WINDOW`` batches is more than twice the median before,
    and farther from it than four times the distance between the quartiles there; of a negative
    loss, by its magnitude. A problem is what is wrong in a word, and a message.
    """

    def __init__(self) -> None:
        self._phase: str | None = None
        self._losses: deque[Tensor] = deque(maxlen=WINDOW)
        self._count = 0
        self._before: list[float] = []
        self._lowest: list[float] = []
        self._first: list[Tensor] = []

    def enter(self, phase: str) -> Iterator[Problem]:
        """A phase begins; what is to be said of the one before."""
        if self._phase == "calibrate":
            yield from self._learning_rate()
        known = [float(loss) for loss in self._losses]
        # After two phases in a row too short to compare, the one before them is compared.
        if len(known) >= WINDOW // 2 or self._phase == "calibrate":
            self._before = known
        self._phase, self._count = phase, 0
        self._lowest = []
        self._losses.clear()

    def add(self, outputs: Any) -> Iterator[Problem]:
        """A batch has ended; what is to be said of it.

        Args:
            outputs: What Lightning hands on of ``training_step``; without a loss nothing is said.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach().reshape(())
        self._losses.append(loss)
        self._count += 1
        if len(self._first) < _FIRST:
            self._first.append(loss)
        if self._count % WINDOW:
            return
        recent = torch.stack([loss.float() for loss in self._losses]).tolist()
        if not all(map(math.isfinite, recent)):
            yield (
                "not finite",
                f"the loss is not finite in phase {self._phase!r}: the run has diverged. Lower the "
                "learning rate, clip gradients, or train in bfloat16 instead of float16",
            )
            return
        if self._count == WINDOW and self._before and self._phase in _REMEDIES:
            yield from self._jump(recent)
        if self._lowest and _has_risen(self._lowest, recent):
            yield (
                "diverged",
                f"the loss rises in phase {self._phase!r}: {_median(recent)} now, "
                f"{_median(self._lowest)} at its best. Lower the learning rate and anneal it",
            )
        if not self._lowest or statistics.median(recent) < statistics.median(self._lowest):
            self._lowest = recent

    def _learning_rate(self) -> Iterator[Problem]:
        last = [float(loss) for loss in self._losses][-_LAST:]
        first = [float(loss) for loss in self._first]
        if len(last) == _LAST and len(self._losses) >= _FIRST + _LAST and _has_risen(first, last):
            yield (
                "learning rate",
                f"the loss rose from {_median(first)} to {_median(last)} while nothing was "
                "quantized: the learning rate is too high to fine-tune. About 1 % of the float "
                "training's, annealed to 0, is where to begin",
            )

    def _jump(self, recent: list[float]) -> Iterator[Problem]:
        if _has_risen(self._before, recent):
            assert self._phase is not None
            yield (
                self._phase,
                f"the loss went from {_median(self._before)} to {_median(recent)} when phase "
                f"{self._phase!r} began. {_REMEDIES[self._phase]}",
            )


def _has_risen(before: list[float], after: list[float]) -> bool:
    old = statistics.median(before)
    low, _, high = statistics.quantiles(before, n=4) if len(before) > 1 else (old, old, old)
    return statistics.median(after) - old > max(abs(old), 4 * (high - low))


def _median(losses: list[float]) -> str:
    return f"{statistics.median(losses):.4g}"
