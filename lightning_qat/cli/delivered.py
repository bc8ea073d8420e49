"""What an export has written, in lines, and whether all of it is as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_qat.export.delivery.result import ExportResult


def is_fine(result: ExportResult) -> bool:
    """Whether a target is written, with the model's parameters."""
    agreement = result.agreement
    return result.error is None and not (agreement and agreement.parameter_differences)


def lines_of(results: Sequence[ExportResult]) -> list[str]:
    """Agreement or failure of each target, what is to be known of it, and its files."""
    lines = []
    for result in results:
        if result.agreement is not None:
            lines.append(str(result.agreement))
        if result.error is not None:
            lines.append(f"{result.target}: failed: {type(result.error).__name__}: {result.error}")
        if result.artifact is not None:
            told = (*result.artifact.differences, *result.artifact.notes)
            lines += [f"  {note}" for note in told]
            lines += [f"  {role}: {path}" for role, path in result.artifact.files.items()]
    return lines
