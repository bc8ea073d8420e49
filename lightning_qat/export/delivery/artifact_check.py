"""What an exporter returns must be true: the files that it names are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_qat.export.protocol import Artifact


def checked_artifact(artifact: Any, exporter: str, folder: Path) -> Artifact:
    """What an exporter returned, if every file that it names lies in the folder.

    Args:
        artifact: What it returned.
        exporter: Its name.
        folder: Where its files must be, or in a folder below.

    Raises:
        TypeError: It is no ``Artifact``, its files are no paths, or its notes no strings.
        ValueError: Files are missing or elsewhere, or there are none; all are named.
    """
    if not isinstance(artifact, Artifact) or not isinstance(artifact.files, Mapping):
        raise TypeError(
            f"The exporter {exporter!r} must return an Artifact with the files it wrote; got "
            f"{type(artifact).__name__}."
        )
    no_paths = [role for role, path in artifact.files.items() if not isinstance(path, Path)]
    if no_paths:
        raise TypeError(
            f"The exporter {exporter!r} must name its files as pathlib.Path; these are none: "
            f"{', '.join(map(repr, no_paths))}."
        )
    if not all(isinstance(note, str) for note in artifact.notes):
        raise TypeError(f"The exporter {exporter!r} must give its notes as strings.")
    problems = []
    for role, path in artifact.files.items():
        if relative_to(path, folder) is None:
            problems.append(f"{role!r}: {str(path)!r} is not in {str(folder)!r}")
        elif not path.is_file():
            problems.append(f"{role!r}: there is no file {str(path)!r}")
    if not artifact.files:
        problems.append("it names none")
    if problems:
        raise ValueError(
            f"The exporter {exporter!r} must name the files that it wrote to the export folder; "
            f"{'; '.join(problems)}. That is for its author to mend."
        )
    return artifact


def relative_to(path: Path, folder: Path) -> Path | None:
    """A path below a folder, wherever links lead; ``None``: it is not below."""
    try:
        return path.resolve().relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):
        return None
