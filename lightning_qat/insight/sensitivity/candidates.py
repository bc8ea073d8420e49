"""Measure a model with some of its layers quantized, each candidate once."""

from __future__ import annotations

import torch

from lightning_qat.insight.sensitivity.metrics import Metric
from lightning_qat.insight.sensitivity.switched_model import Assignment, Choice, SwitchedModel
from lightning_qat.insight.sensitivity.unchanged import Unchanged


class Candidates:
    """Measures assignments of bits to units.

    Args:
        switched: The model.
        metric: What is measured.
        unchanged: Guards the model against the evaluation.

    Attributes:
        switched: The model.
        metric: What is measured.
        measured: How many evaluations there were.
    """

    def __init__(self, switched: SwitchedModel, metric: Metric, unchanged: Unchanged) -> None:
        self.switched, self.metric = switched, metric
        self._unchanged = unchanged
        self._known: dict[tuple[tuple[str, Choice], ...], float] = {}
        self.measured = 0

    def measure(self, assignment: Assignment, what: str) -> float:
        """The metric with some units quantized, and the others float.

        Args:
            assignment: Unit to bits.
            what: The candidate in words, for errors.

        Raises:
            ValueError: The metric is not finite, or the evaluation changed the model.
        """
        quantized = {name: bits for name, bits in assignment.items() if bits is not None}
        key = tuple(sorted(quantized.items()))
        if key not in self._known:
            self.switched.quantize(quantized)
            try:
                with torch.no_grad():
                    value = self.metric.measure(self.switched.model)
            except ValueError as error:
                raise ValueError(f"{error} (measured: {what}).") from error
            self.measured += 1
            self._unchanged.check(self.switched.model)
            self._known[key] = value
        return self._known[key]

    def everything(self) -> dict[str, Choice]:
        """All units as the recipe has them."""
        return {unit.name: unit.bits for unit in self.switched.units}
