"""From the data to one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from lightning_qat.atomic_write import replacing
from lightning_qat.export.protocol import Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs
from lightning_qat.report.charts import histogram_chart, loss_chart
from lightning_qat.report.collect import collect
from lightning_qat.report.data import ReportData
from lightning_qat.report.folder import read_manifest
from lightning_qat.report.layout import layout_of
from lightning_qat.report.targets import CHANGED, MISSING

REPORT = "report.html"


class Written(NamedTuple):
    """A report that was written.

    Args:
        path: Where.
        wrong_files: Files of the manifest that are missing or changed, in words.
    """

    path: Path
    wrong_files: tuple[str, ...]


def write_report(
    folder: Path,
    model: QuantizedModel,
    *,
    name: str | None = None,
    inputs: Inputs | None = None,
    exporters: Sequence[Exporter] = (),
    compare: bool = True,
) -> Written:
    """Write ``report.html`` beside an export's manifest.

    Args:
        folder: Where ``export_all`` wrote.
        model: The converted model.
        name: Its name; the folder's by default.
        inputs: What ``forward`` takes, for the activations; the model's example inputs by default.
        exporters: Those that wrote the files, when they have options.
        compare: Compare each file with the model, layer by layer.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: The manifest is damaged, or the inputs do not fit.
    """
    manifest = read_manifest(folder)
    name = name or folder.resolve().name
    data = collect(
        model, manifest, folder, name, inputs=inputs, exporters=exporters, compare=compare
    )
    with replacing(folder / REPORT) as temporary:
        temporary.write_text(render(data), encoding="utf-8")
    wrong = (
        f"{target.name}: {file.path} is {file.state}"
        for target in data.targets
        for file in target.files
        if file.state in (MISSING, CHANGED)
    )
    return Written(folder / REPORT, tuple(wrong))


def report_or_reason(folder: Path, model: QuantizedModel, **options: Any) -> str | None:
    """Write a report after an export, which it must not cost.

    Args:
        folder: As for ``write_report``.
        model: As for ``write_report``.
        **options: As for ``write_report``.

    Returns:
        ``None``, or why there is none, with the command that makes it later.
    """
    try:
        write_report(folder, model, **options)
    except Exception as error:
        return (
            f"{REPORT} is not written: {type(error).__name__}: {error}. The exports do not depend "
            f"on it. To make it later: lightning-qat report {folder}"
        )
    return None


def render(data: ReportData) -> str:
    """The page; every name and text of the model is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("lightning_qat.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        number=number, size=size, count=count, percent=percent, decibels=decibels
    )
    folder = files("lightning_qat.report") / "templates"
    script, style = ((folder / f).read_text("utf-8") for f in ("page.js", "page.css"))
    # The browser runs this script and no other, whatever a name may hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("report.html").render(
        data=data,
        layout=layout_of(data.plan),
        histogram_chart=histogram_chart,
        loss=loss_chart(data.training),
        script=Markup(script),
        style=Markup(style),
        digest=digest,
    )


def number(value: float | None) -> str:
    """Four digits.

    Example:
        >>> number(0.123456), number(None), number(float("inf"))
        ('0.1235', '–', '∞')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def size(value: int | None) -> str:
    """Bytes in the unit that fits.

    Example:
        >>> size(31702), size(999), size(None)
        ('31.7 kB', '999 B', '–')
    """
    return "–" if value is None else f"{_scaled(value, 'B')}"


def count(value: int) -> str:
    """A large number.

    Example:
        >>> count(1_234_000), count(12)
        ('1.23 M', '12')
    """
    return _scaled(value, "").strip()


def _scaled(value: float, unit: str) -> str:
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.0f} {unit}"


def percent(value: float | None) -> str:
    """A share.

    Example:
        >>> percent(0.1234), percent(0.0), percent(0.00001)
        ('12.3 %', '0 %', '< 0.01 %')
    """
    if value is None or math.isnan(value):
        return "–"
    if 0 < value < 1e-4:
        return "< 0.01 %"
    return f"{100 * value:.3g} %"


def decibels(value: float | None) -> str:
    """One digit after the point.

    Example:
        >>> decibels(41.27), decibels(float("inf"))
        ('41.3', '∞')
    """
    return number(value) if value is None or not math.isfinite(value) else f"{value:.1f}"
