"""Which target a file is of, found by asking the exporters."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning_qat.export.load import ENTRY_POINT_GROUP, load_exporter
from lightning_qat.export.protocol import Artifact, Exporter, MissingDependency


@runtime_checkable
class Recognizing(Protocol):
    """An exporter that knows files of its own when it sees them."""

    def artifact_of(self, path: Path) -> Artifact | None:
        """The artifact that a file belongs to, with the files beside it; ``None``: of another.

        Raises:
            ValueError: It has this target's format and cannot be read.
        """
        ...


def artifact_of(path: str | Path) -> Artifact:
    """The artifact that a file belongs to, as its exporter would have returned it.

    Its notes and differences are not known.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: No exporter knows it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There must be an exported file at {str(path)!r}; none is there.")
    for exporter in installed_exporters():
        found = exporter.artifact_of(path) if isinstance(exporter, Recognizing) else None
        if found is not None:
            return found
    raise ValueError(
        f"{str(path)!r} must be a file that an exporter wrote: a deploy or QDQ model (.onnx) or a "
        "TFLite file; no exporter knows it."
    )


def installed_exporters() -> list[Exporter]:
    """Every exporter whose module can be imported, by name."""
    found = []
    for name in sorted(point.name for point in entry_points(group=ENTRY_POINT_GROUP)):
        try:
            found.append(load_exporter(name))
        except MissingDependency:
            continue
    return found
