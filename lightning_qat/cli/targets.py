"""The exporters that commands name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qat.export.protocol import Exporter

PRODUCT = "The Ascend product, as ATC's --soc_version begins: Ascend310P, Ascend910B, ..."
"""Help of ``--product``."""


def with_product(name: str, arguments: Mapping[str, Any], product: str | None) -> Any:
    """A target's exporter; ``--product`` is an option of cann's alone."""
    from lightning_qat.export.load import load_exporter

    if product is not None and name != "cann":
        raise ValueError(
            f"--product names an Ascend product; the target is {name!r}. Leave it out."
        )
    options = {} if product is None else {"product": product}
    return type(load_exporter(name))(**arguments, **options)


def available(names: str) -> list[Exporter]:
    """The exporters of names with commas between them, checked before any long work.

    Raises:
        ValueError: Some are unknown, repeated, or lack a package; all of them are named.
    """
    from lightning_qat.export.delivery.export_all import refuse_repeated
    from lightning_qat.export.load import load_exporter

    problems, loaded = [], []
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            loaded.append(load_exporter(name))
            loaded[-1].check_available()
        except (ValueError, ImportError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    if not loaded:
        raise ValueError("--to must name at least one target, such as cann,tflite.")
    refuse_repeated(loaded)
    return loaded
