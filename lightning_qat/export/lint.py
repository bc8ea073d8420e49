"""Findings of a lint of a target's file; the rules are in the target's exporter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Severity = Literal["error", "warning", "advice"]


@dataclass(frozen=True)
class Finding:
    """One rule that a file breaks, or advice on it.

    Args:
        severity: ``error`` where the target refuses the file or computes something else,
            ``warning`` where some of its versions do or numbers may suffer, else ``advice``.
        node: The node or tensor.
        must: What must hold.
        got: What the file has.
        remedy: What to do about it.
    """

    severity: Severity
    node: str
    must: str
    got: str
    remedy: str

    def __str__(self) -> str:
        """One line."""
        return f"{self.severity}: {self.node!r}: {self.must}; got {self.got}. {self.remedy}."


@runtime_checkable
class Linting(Protocol):
    """An exporter that knows the rules its target has for files."""

    def lint(self, path: str | Path) -> Sequence[Finding]:
        """Check a file against every known rule; an empty sequence where it keeps all.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be read at all.
        """
        ...
