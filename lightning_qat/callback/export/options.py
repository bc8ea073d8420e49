"""What a run is to export, checked when the callback is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_qat.export.load import check_names
from lightning_qat.export.protocol import Exporter


@dataclass(frozen=True)
class ExportOptions:
    """What a run is to export; see ``QATCallback``.

    Args:
        exporters: Names or exporters.
        folder: Where files go; ``None``: ``qat_export`` in the logger's folder.
        source: ``last`` or ``best``.
        verify: Compare every file with the trained model.
        on_error: ``raise`` an export's error, or ``warn`` of it.
        trial: Try the exporters on the untrained model.
        outputs: Names of the outputs to export; ``None``: all.
        dynamic_shapes: As for ``convert``.
        timeout: Seconds for each target, in a process of its own; ``None``: no limit.
    """

    exporters: Sequence[str | Exporter]
    folder: str | Path | None
    source: Literal["last", "best"]
    verify: bool
    on_error: str
    trial: bool
    outputs: Sequence[str] | None
    dynamic_shapes: Any
    timeout: float | None


def check_options(
    exporters: object, source: object, on_error: object, outputs: object, timeout: object
) -> None:
    """Refuse options that can be nothing but a mistake.

    Raises:
        ValueError: An unknown name, or a value that is none of those allowed.
    """
    if isinstance(exporters, str):
        raise ValueError(
            f"exporters must be a list; got {exporters!r}. Write exporters=[{exporters!r}]."
        )
    check_names(exporters)  # type: ignore[arg-type]
    if source not in ("last", "best"):
        raise ValueError(f"export_from must be 'last' or 'best'; got {source!r}.")
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_export_error must be 'raise' or 'warn'; got {on_error!r}.")
    if isinstance(outputs, str):
        raise ValueError(
            f"export_outputs must be a list; got {outputs!r}. Write export_outputs=[{outputs!r}]."
        )
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and timeout > 0):  # type: ignore[operator]
        raise ValueError(
            f"export_timeout must be None or a positive number of seconds; got {timeout!r}."
        )
