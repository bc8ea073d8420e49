"""What came of an export: files or an error for each target, and what else is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_qat.export.protocol import Artifact
from lightning_qat.export.verify import Agreement


class NotTried(RuntimeError):
    """A target whose turn never came, because the run was interrupted before."""


@dataclass(frozen=True)
class ExportResult:
    """The result of one target: an artifact with its agreement, or an error.

    Args:
        target: Name of the exporter.
        artifact: Its files; ``None`` when the export failed.
        agreement: How far they are from the model; ``None`` when not asked for or not reached.
        error: What failed; ``None`` when nothing did.
    """

    target: str
    artifact: Artifact | None = None
    agreement: Agreement | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Delivery:
    """What ``export_all`` has left in a folder.

    Args:
        folder: The folder.
        results: One result per target.
        model_file: Where the converted model is saved; ``None``: it could not be.
        unwritten: By name, why other files could not be written: the converted model, the manifest.
        interrupt: What ended the exports early, such as Ctrl-C; to be raised again when the user
            has been told.
    """

    folder: Path
    results: tuple[ExportResult, ...]
    model_file: Path | None = None
    unwritten: Mapping[str, BaseException] = field(default_factory=dict)
    interrupt: BaseException | None = None

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the targets to export again."""
        return tuple(r.target for r in self.results if r.error is not None)

    def problem(self) -> str | None:
        """Everything that failed and what was written, in words; ``None``: nothing failed."""
        if not self.failed and not self.unwritten:
            return None
        whole = [r.target for r in self.results if r.error is None]
        lines = [f"written to {str(self.folder)!r}: {', '.join(whole) or 'no target'}."]
        if self.failed:
            lines[0] = f"{len(self.failed)} of {len(self.results)} exports failed; {lines[0]}"
        else:
            lines[0] = f"{', '.join(self.unwritten)} could not be written; {lines[0]}"
        lines += [f"{r.target}: {error_text(r.error)}" for r in self.results if r.error is not None]
        lines += [f"{name}: {error_text(error)}" for name, error in self.unwritten.items()]
        return "\n".join(lines)


def error_text(error: BaseException) -> str:
    """An error in words, also one of a class that cannot say what it is.

    Example:
        >>> error_text(KeyError("scale"))
        "KeyError: 'scale'"
    """
    kind = type(error).__name__
    try:
        text = str(error)
    except BaseException as other:  # of a third party's class
        text = f"its text cannot be read ({type(other).__name__})"
    return f"{kind}: {text}" if text else kind
