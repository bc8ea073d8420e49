"""Bars and lines by matplotlib, which is loaded when something is drawn."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def bars(
    path: str | Path, labels: Sequence[str], values: Sequence[float], *, title: str, label: str
) -> None:
    """Draw one horizontal bar per label, the first one on top.

    Args:
        path: The file; its suffix (``.svg``, ``.png``, ``.pdf``) gives the format.
        labels: The bars' names.
        values: Their lengths.
        title: Above the plot.
        label: Below the axis.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axes = _figure(8.0, 1.2 + 0.22 * max(1, len(labels)))
    places = range(len(labels))
    axes.barh(places, values, color="tab:blue")
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    figure.savefig(path, metadata=_metadata(path))


def lines(
    path: str | Path,
    labels: Sequence[str],
    curves: Mapping[str, Sequence[float]],
    *,
    title: str,
    label: str,
) -> None:
    """Draw one curve per name over the same labels.

    Args:
        path: The file; its suffix gives the format.
        labels: The places on the horizontal axis.
        curves: Name to a value for each label.
        title: Above the plot.
        label: Beside the axis.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure, axes = _figure(max(6.0, 1.5 + 0.25 * len(labels)), 5.0)
    for name, values in curves.items():
        axes.plot(range(len(labels)), values, marker=".", label=name)
    axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, metadata=_metadata(path))


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib: pip install 'lightning-qat[report]'. The numbers are in the "
            "result without it: print(result), result.rows."
        ) from error
    figure: Any = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _metadata(path: str | Path) -> dict[str, None] | None:
    """The same picture is the same file."""
    return {"Date": None} if Path(path).suffix == ".svg" else None
