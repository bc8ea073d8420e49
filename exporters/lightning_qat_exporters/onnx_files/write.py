"""Write an ONNX model atomically, with external data where protobuf's 2 GB would not do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from lightning_qat.atomic_write import replacing
from lightning_qat_exporters.onnx_files.streamed_write import write_streamed

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Protobuf refuses 2 GiB; names and attributes need some room."""


def save_onnx(
    model: ir.Model, path: Path, *, external_above: int = EXTERNAL_DATA_BYTES
) -> tuple[Path, ...]:
    """Write a model to ``path``; weights go to ``<path>.data`` when they are too many.

    Returns:
        The files: the model, and its weights where they are apart.
    """
    with replacing(path) as temporary:
        return write_onnx(model, temporary, path, external_above=external_above)


def write_onnx(
    model: ir.Model, temporary: Path, path: Path, *, external_above: int = EXTERNAL_DATA_BYTES
) -> tuple[Path, ...]:
    """Write a model to ``temporary``, which becomes ``path``; returns what ``save_onnx`` does."""
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    if size <= external_above:
        write_streamed(model, temporary)
        return (path,)
    external = f"{path.name}.data"
    ir.save(model, temporary, external_data=external)
    return path, path.with_name(external)


def require_writable(paths: Iterable[Path]) -> None:
    """Check before long work that files can be written.

    Raises:
        OSError: A path is a folder, or its folder cannot be made or written to.
    """
    for path in paths:
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if path.is_dir():
            raise IsADirectoryError(f"{str(path)!r} must be a file to write; it is a folder.")
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise PermissionError(
                f"{str(path)!r} must be a file to write; {str(folder)!r} is not a folder that can "
                "be written to."
            )
