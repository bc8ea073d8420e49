"""What a training run leaves for the report: losses, phases, what stayed float, weights' noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.insight.weights import weight_rows
from lightning_qat.prepare.report import PrepareReport

MOST_LOSSES = 500
"""So many losses of a run are kept: what is seen on a curve 720 pixels wide."""


class RunRecord:
    """Losses and phases of a run, in bounded memory and without waiting for a device."""

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []
        self._phases: list[tuple[int, str]] = []
        self._every = 1
        self._seen = 0

    def enter(self, step: int, phase: str) -> None:
        """A phase begins before the batch after ``step`` optimizer steps."""
        self._phases.append((step, phase))

    def add(self, step: int, outputs: Any) -> None:
        """A batch has ended.

        Args:
            step: Optimizer steps so far.
            outputs: What Lightning hands on of ``training_step``: a mapping with ``loss``, the
                loss, or anything else, which has none.
        """
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        self._seen += 1
        if (self._seen - 1) % self._every:
            return
        self._losses.append((step, loss.detach().reshape(())))
        if len(self._losses) > MOST_LOSSES:
            self._losses = self._losses[::2]
            self._every *= 2

    def to_dict(self) -> dict[str, Any]:
        """Primitives, for the manifest; waits for the device."""
        losses = torch.stack([loss.float() for _, loss in self._losses]) if self._losses else None
        values = [] if losses is None else losses.tolist()
        points = zip(self._losses, values, strict=True)
        return {
            "loss": [[step, loss] for (step, _), loss in points if math.isfinite(loss)],
            "phases": [[step, phase] for step, phase in self._phases],
        }


def run_facts(model: nn.Module, report: PrepareReport | None, record: RunRecord) -> dict[str, Any]:
    """What the manifest tells the report of a run, as primitives.

    Args:
        model: The trained module.
        report: What ``prepare`` has said of it.
        record: Its losses and phases.
    """
    facts = {**record.to_dict(), "weight_sqnr_db": dict(_weight_sqnr(model))}
    if report is not None:
        facts["left_float"] = [*map(list, _left_float(report))]
    return facts


@torch.no_grad()
def _weight_sqnr(model: nn.Module) -> Iterator[tuple[str, float]]:
    for row in weight_rows(model):
        assert row.total is not None
        if math.isfinite(row.total.sqnr_db):
            yield row.name, round(row.total.sqnr_db, 2)


def _left_float(report: PrepareReport) -> Iterator[tuple[str, str, str]]:
    """Name, kind and reason of each layer and call."""
    for layer in report.skipped:
        yield layer.name, layer.kind, layer.reason
    for text in () if report.joins is None else report.joins.left_float:
        call, _, reason = text.partition(": ")
        yield call, "call", reason
