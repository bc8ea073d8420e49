"""An export folder as a report finds it: its manifest, and the converted model of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lightning_qat.export.delivery.manifest import MANIFEST
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.plain_data.parse_json import parse_json
from lightning_qat.plain_data.shape import as_shape
from lightning_qat.plain_data.text import read_text
from lightning_qat.report.manifest_shape import StoredManifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """What ``export_all`` has written to a folder.

    Raises:
        FileNotFoundError: There is no manifest.
        ValueError: It is none, or names files outside of the folder.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"There must be a {MANIFEST} in {str(folder)!r}, as QATCallback(exporters=...) and "
            "lightning-qat export write it; there is none. Name the folder with the exported files."
        )
    text = read_text(path)
    try:
        found = parse_json(text)
        if not isinstance(found, dict) or not isinstance(found.get("targets"), dict):
            raise ValueError("it is no manifest of an export, for it lists no targets")
        manifest = as_shape(found, StoredManifest, "a manifest")
        outside = [*_outside(manifest)]
        if outside:
            raise ValueError(f"files must be in the manifest's folder; it names {outside}")
    except ValueError as error:
        message = str(error).removesuffix(".")
        raise ValueError(f"{str(path)!r} is damaged: {message}. Export again.") from error
    return cast(dict[str, Any], manifest)


def _outside(manifest: StoredManifest) -> Iterator[str]:
    """The paths that lead out of the folder, or name nothing in it."""
    for target in manifest["targets"].values():
        for file in target.get("files", {}).values():
            path = PurePosixPath(file["path"])
            # A drive, a stream or a folder of Windows is none of ours either.
            odd = set(file["path"]) & {"\\", ":", "\0"}
            long = len(file["path"]) > 1000 or any(len(os.fsencode(p)) > 255 for p in path.parts)
            if path.is_absolute() or ".." in path.parts or not path.name or odd or long:
                yield file["path"][:200]


def find_model(folder: Path, manifest: dict[str, Any]) -> Path:
    """The ``.pt2`` that the files of a folder were made of.

    Raises:
        FileNotFoundError: There is none, or several that may be it.
    """
    found = sorted(folder.glob("*.pt2"))
    files = [
        str(file["path"])
        for entry in manifest["targets"].values()
        for file in entry.get("files", {}).values()
    ]
    named = [path for path in found if any(file.startswith(path.stem) for file in files)]
    # The longest name: net_large.onnx is not of net.pt2 where there is a net_large.pt2.
    longest = max((len(path.stem) for path in named), default=0)
    candidates = [path for path in named if len(path.stem) == longest] or found
    if len(candidates) == 1:
        return candidates[0]
    got = ", ".join(path.name for path in found) or "none"
    raise FileNotFoundError(
        f"The converted model (.pt2) of {str(folder)!r} must be known; the folder holds {got}. "
        "Name it: lightning-qat report FOLDER --model net.pt2. Without it, "
        "lightning-qat export CHECKPOINT makes it anew."
    )


def require_model_of(manifest: dict[str, Any], model: QuantizedModel, path: Path) -> None:
    """Make sure that a converted model is the one that a manifest's files were made of.

    Args:
        manifest: What ``read_manifest`` returned.
        model: The model.
        path: Its file, for the message.

    Raises:
        ValueError: It is another one.
    """
    of_model = [*model.input_names], [*model.output_names]
    of_files = manifest.get("inputs"), manifest.get("outputs")
    if of_model != of_files:
        raise ValueError(
            f"{str(path)!r} must be the model that the manifest's files were made of; it has the "
            f"inputs and outputs {of_model[0]} and {of_model[1]}, they have {of_files[0]} and "
            f"{of_files[1]}. Name the right one with --model."
        )
