"""``manifest.json``: what an export has left in its folder. Written last, and never untrue."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_qat.atomic_write import replacing
from lightning_qat.export.delivery.artifact_check import relative_to
from lightning_qat.export.delivery.result import ExportResult, error_text
from lightning_qat.ir.quantized_model import QuantizedModel

MANIFEST = "manifest.json"
_PACKAGES = (
    *("lightning-qat", "torch", "lightning", "numpy", "onnx", "onnxruntime", "onnxscript"),
    *("litert-torch", "ai-edge-litert"),
)


def withdraw(folder: Path, targets: Iterable[str]) -> Mapping[str, Any]:
    """Take targets out of a folder's manifest, because their files are about to change.

    A process that is killed while it exports leaves new files; the manifest must not say of them
    what was true of the old ones.

    Returns:
        What the manifest said before; empty without one.
    """
    path, found = folder / MANIFEST, _read(folder / MANIFEST)
    said = found.get("targets", {})
    kept = {target: entry for target, entry in said.items() if target not in targets}
    if kept == said:
        return found
    try:
        _write(path, {**found, "targets": kept})
    except OSError:
        # As on a full disk: no manifest is better than a wrong one.
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return found


def write_manifest(
    folder: Path,
    model: QuantizedModel,
    results: Iterable[ExportResult],
    *,
    earlier: Mapping[str, Any],
    training: Mapping[str, Any] | None,
) -> None:
    """Write what was exported, in place of what ``withdraw`` has left.

    Args:
        folder: Where the files are.
        model: The converted model.
        results: One per target.
        earlier: What the manifest said before. Of the same model, by its ``fingerprint``, targets
            whose files are still as it says stay in it.
        training: What the report shall say of the run, as primitives; ``None``: what was said of
            it before.

    Raises:
        OSError: The manifest cannot be written.
    """
    if earlier.get("model") != model.fingerprint:
        earlier = {}
    training = earlier.get("training") if training is None else training
    kept = earlier.get("targets", {})
    manifest = {
        "model": model.fingerprint,
        "versions": _versions(),
        "python": platform.python_version(),
        "recipe": model.recipe,
        "inputs": model.input_names,
        "input_shapes": {name: [*shape] for name, shape in model.input_shapes.items()},
        "outputs": model.output_names,
        "targets": {
            **{target: entry for target, entry in kept.items() if _is_true(entry, folder)},
            **{result.target: _entry(result, folder) for result in results},
        },
        **({} if training is None else {"training": training}),
    }
    _write(folder / MANIFEST, manifest)


def _write(path: Path, manifest: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """What a manifest says; empty where there is none, or something else of that name."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    is_manifest = isinstance(found, dict) and isinstance(found.get("targets"), dict)
    return found if is_manifest else {}


def _is_true(entry: Any, folder: Path) -> bool:
    """Whether the files of a target are there and have the content that an entry says."""
    try:
        return all(
            file == _file(folder / file["path"], folder) for file in entry.get("files", {}).values()
        )
    except (OSError, AttributeError, KeyError, TypeError):
        return False


def _entry(result: ExportResult, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if result.artifact is not None:
        try:
            files = {role: _file(path, folder) for role, path in result.artifact.files.items()}
        except OSError as error:  # It was there a moment ago.
            return {"error": error_text(error)}
        entry["files"] = files
        entry["notes"] = result.artifact.notes
        entry["differences"] = result.artifact.differences
    if result.agreement is not None:
        entry["agreement"] = result.agreement.to_dict()
    if result.error is not None:
        entry["error"] = error_text(result.error)
    return entry


def _file(path: Path, folder: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    place = relative_to(path, folder)
    assert place is not None  # checked_artifact has looked
    return {"path": place.as_posix(), "bytes": size, "sha256": digest.hexdigest()}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
