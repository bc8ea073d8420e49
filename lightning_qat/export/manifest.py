"""Write a converted model for every target, check each file, and list it all in a manifest."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_qat.atomic_write import replacing
from lightning_qat.export.promises import with_broken_promises
from lightning_qat.export.protocol import Artifact, Exporter
from lightning_qat.export.verify import Agreement, verify
from lightning_qat.ir.quantized_model import QuantizedModel

MANIFEST = "manifest.json"
_PACKAGES = (
    *("lightning-qat", "torch", "lightning", "numpy", "onnx", "onnxruntime", "onnxscript"),
    *("litert-torch", "ai-edge-litert"),
)


@dataclass(frozen=True)
class ExportResult:
    """The result of one target: an artifact with its agreement, or an error.

    Args:
        target: Name of the exporter.
        artifact: Its files; ``None`` when the export failed.
        agreement: How far they are from the model; ``None`` when not asked for or not reached.
        error: What failed; ``None`` when nothing did.
    """

    target: str
    artifact: Artifact | None = None
    agreement: Agreement | None = None
    error: Exception | None = None


def export_all(
    model: QuantizedModel,
    exporters: Sequence[Exporter],
    folder: Path,
    name: str,
    *,
    check: bool = True,
    inputs: Any = None,
    source: str | None = None,
    training: Mapping[str, Any] | None = None,
) -> tuple[ExportResult, ...]:
    """Export to every target and write ``manifest.json`` beside the files.

    A target that fails does not keep the others from being written; its error is in the result and
    in the manifest. Targets that a manifest in the folder has of the same model, by its
    ``fingerprint``, stay in it; those of another model do not.

    Args:
        model: The converted model.
        exporters: One per target.
        folder: Where the files go; made when it is missing.
        name: Beginning of every file's name.
        check: Verify every artifact.
        inputs: What to verify with; the model's example inputs by default.
        source: Where these inputs are from, in words.
        training: What the report shall say of the run, as primitives; ``None``: nothing is known.

    Returns:
        One entry per exporter, in their order.

    Raises:
        ValueError: Two exporters have the same name, so they would write the same files.
    """
    refuse_repeated(exporters)
    results = tuple(_export_one(model, e, folder / name, check, inputs, source) for e in exporters)
    earlier = _earlier(folder / MANIFEST, model)
    training = earlier.get("training") if training is None else training
    manifest = {
        "model": model.fingerprint,
        "versions": _versions(),
        "python": platform.python_version(),
        "recipe": model.recipe,
        "inputs": model.input_names,
        "input_shapes": {name: [*shape] for name, shape in model.input_shapes.items()},
        "outputs": model.output_names,
        "targets": {
            **earlier.get("targets", {}),
            **{result.target: _entry(result, folder) for result in results},
        },
        **({} if training is None else {"training": training}),
    }
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return results


def _earlier(path: Path, model: QuantizedModel) -> dict[str, Any]:
    """What a manifest says of the same model; empty where there is none, or of another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = isinstance(found, dict) and found.get("model") == model.fingerprint
    return found if same else {}


def refuse_repeated(exporters: Sequence[Exporter]) -> None:
    """Raise ``ValueError`` when two exporters have one name: they would write the same files."""
    names = [exporter.name for exporter in exporters]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ValueError(
            f"Each target may be asked for once, else its files overwrite each other; got "
            f"{repeated} more than once. Keep one, and write the other after training to another "
            "path: export(QuantizedModel.load('...pt2'), exporter, path_prefix)."
        )


def _export_one(
    model: QuantizedModel,
    exporter: Exporter,
    prefix: Path,
    check: bool,
    inputs: Any,
    source: str | None,
) -> ExportResult:
    artifact = None
    try:
        artifact = with_broken_promises(model, exporter.export(model, prefix))
        agreement = verify(model, artifact, inputs, exporter, source=source) if check else None
    except Exception as error:
        return ExportResult(exporter.name, artifact, None, error)
    return ExportResult(exporter.name, artifact, agreement)


def _entry(result: ExportResult, folder: Path) -> dict[str, Any]:
    entry: dict[str, Any] = {}
    if result.artifact is not None:
        entry["files"] = {
            role: {
                "path": path.relative_to(folder).as_posix(),
                "bytes": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for role, path in result.artifact.files.items()
        }
        entry["notes"] = result.artifact.notes
        entry["differences"] = result.artifact.differences
    if result.agreement is not None:
        entry["agreement"] = result.agreement.to_dict()
    if result.error is not None:
        entry["error"] = f"{type(result.error).__name__}: {result.error}"
    return entry


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
