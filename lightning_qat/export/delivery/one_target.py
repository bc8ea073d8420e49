"""One target: whatever its exporter does, the result says what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_qat.export.delivery.artifact_check import checked_artifact
from lightning_qat.export.delivery.guard import Interrupts, same_process_after
from lightning_qat.export.delivery.result import ExportResult
from lightning_qat.export.promises import with_broken_promises
from lightning_qat.export.protocol import Exporter
from lightning_qat.export.verify import verify


@dataclass(frozen=True)
class Order:
    """What every target of an export is asked for.

    Args:
        prefix: Folder and beginning of every file's name, absolute.
        check: Compare the files with the model.
        inputs: What to compare with; ``None``: the model's example inputs.
        source: Where these inputs are from, in words.
    """

    prefix: Path
    check: bool = True
    inputs: Any = None
    source: str | None = None


def export_one(
    model: Any, exporter: Exporter, order: Order, interrupts: Interrupts
) -> ExportResult:
    """Export to one target and check its files.

    Args:
        model: The ``QuantizedModel``.
        exporter: The target's.
        order: What is asked for.
        interrupts: Whether someone has asked this process to stop.

    Raises:
        BaseException: Only what a signal has raised, such as Ctrl-C. What the exporter raises,
            ``SystemExit`` and ``KeyboardInterrupt`` included, is in the result.
    """
    artifact = None
    try:
        with same_process_after():
            written = exporter.export(model, order.prefix)
            written = checked_artifact(written, exporter.name, order.prefix.parent)
            artifact = with_broken_promises(model, written)
            agreement = None
            if order.check:
                agreement = verify(model, artifact, order.inputs, exporter, source=order.source)
    except BaseException as error:
        if interrupts.arrived and not isinstance(error, Exception):
            raise
        return ExportResult(exporter.name, artifact, None, error)
    return ExportResult(exporter.name, artifact, agreement)
