"""Find an exporter by name, through entry points."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from lightning_qat.export.protocol import Exporter, MissingDependency
from lightning_qat.recipe.suggest import closest_names

ENTRY_POINT_GROUP = "lightning_qat.exporters"


def check_names(exporters: Iterable[object]) -> None:
    """Check the names among exporters; nothing is imported.

    Raises:
        ValueError: No exporter of that name is installed; the message lists those that are.
    """
    found = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    for exporter in exporters:
        if isinstance(exporter, str) and exporter not in found:
            raise ValueError(
                f"No exporter named {exporter!r}; {closest_names(exporter, found)}. "
                f"Installed exporters: {sorted(found)}."
            )


def load_exporter(exporter: str | Exporter | type[Exporter]) -> Exporter:
    """An exporter from its name, itself or its class.

    Names are those of the entry points in the group ``lightning_qat.exporters``; nothing is
    imported but the one that is asked for.

    Raises:
        ValueError: No exporter of that name is installed; the message lists those that are.
        MissingDependency: Its module needs a package that is not installed.
        TypeError: It is no exporter.
    """
    if isinstance(exporter, str):
        check_names([exporter])
        found = {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
        try:
            exporter = found[exporter].load()
        except ImportError as error:
            raise MissingDependency(
                f"The exporter {found[exporter].name!r} needs a package that is not installed: "  # type: ignore[index]
                f"{error}. Install it, or leave the exporter out."
            ) from error
    if isinstance(exporter, type):
        exporter = exporter()
    if not isinstance(exporter, Exporter):
        raise TypeError(
            "An exporter must have name, check_available() and export(); got "
            f"{type(exporter).__name__}."
        )
    return exporter
