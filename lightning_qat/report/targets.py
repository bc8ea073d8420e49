"""What the manifest says of each target, its files as they are now, and where they differ."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_qat.export.compare.comparison import ComparedTensor, Comparison
from lightning_qat.export.compare.file import compare_file
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Artifact, Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.report.data import ErrorRow, FileSize, TargetPart

WORST = 20
"""So many tensors of a target are listed."""
MISSING, CHANGED = "missing", "changed since the export"


def target_part(
    name: str,
    entry: Mapping[str, Any],
    folder: Path,
    model: QuantizedModel,
    exporter: Exporter | None,
    call: tuple[tuple[Any, ...], dict[str, Any]] | None,
) -> TargetPart:
    """One target of a manifest.

    Args:
        name: Its name.
        entry: What the manifest says of it.
        folder: Where its files are.
        model: The model that they were made of.
        exporter: Its exporter, when it has options.
        call: What to run the files on; ``None``: they are not compared.
    """
    files = tuple(_files(entry, folder))
    judgement = ""
    worst: tuple[ErrorRow, ...] = ()
    if files and call is not None and not entry.get("error"):
        try:
            found = _compared(name, entry, folder, model, exporter, call, files)
        except Exception as error:  # runtimes and readers of files raise many kinds
            judgement = f"Layers are not compared: {error}"
        else:
            judgement, worst = found.judgement, tuple(_error_rows(found))
    return TargetPart(
        name,
        files,
        _agreement(entry),
        judgement,
        worst,
        tuple(entry.get("notes", ())),
        tuple(entry.get("differences", ())),
        entry.get("error", ""),
    )


def _agreement(entry: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """As the page shows it, of earlier manifests too."""
    stored = entry.get("agreement")
    return stored and {"source": "", "cautions": [], "remarks": [], **stored}


def _compared(
    name: str,
    entry: Mapping[str, Any],
    folder: Path,
    model: QuantizedModel,
    exporter: Exporter | None,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    files: Sequence[FileSize],
) -> Comparison:
    changed = [f"{file.path} is {file.state}" for file in files if file.state in (MISSING, CHANGED)]
    if changed:
        raise ValueError(f"{'; '.join(changed)}. Export again, or put the files back.")
    paths = {role: folder / file["path"] for role, file in entry["files"].items()}
    target = exporter or load_exporter(name)
    return compare_file(model, Artifact(name, paths), target, *call)


def _files(entry: Mapping[str, Any], folder: Path) -> Iterator[FileSize]:
    """The files that the manifest lists, each with the data that it keeps beside it."""
    listed = {str(file["path"]) for file in entry.get("files", {}).values()}
    for role, file in entry.get("files", {}).items():
        path = folder / file["path"]
        if not path.is_file():
            yield FileSize(role, file["path"], None, MISSING)
            continue
        same = hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
        size = path.stat().st_size
        yield FileSize(role, file["path"], size, "as exported" if same else CHANGED)
        beside = path.with_name(f"{path.name}.data")
        relative = beside.relative_to(folder).as_posix()
        if beside.is_file() and relative not in listed:
            yield FileSize(f"{role}, data", relative, beside.stat().st_size)


def _error_rows(found: Comparison) -> Iterator[ErrorRow]:
    """The first departure, then the largest errors of their own."""
    suspects = [tensor for tensor in found.tensors if tensor.suspicion and tensor.total]
    others = [tensor for tensor in found.worst if not tensor.suspicion]
    for tensor in (suspects + others)[:WORST]:
        yield _error_row(tensor)


def _error_row(tensor: ComparedTensor) -> ErrorRow:
    assert tensor.total is not None
    own = tensor.own
    return ErrorRow(
        tensor.name,
        tensor.made_by,
        math.nan if own is None else own.sqnr_db,
        math.nan if own is None else own.max_steps,
        tensor.total.sqnr_db,
        tensor.total.max_steps,
        tensor.suspicion,
    )
