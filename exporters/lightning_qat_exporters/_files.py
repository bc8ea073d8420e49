"""Write an ONNX model atomically, with external data where protobuf's 2 GB would not do."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from lightning_qat.atomic import replacing

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Protobuf refuses 2 GiB; names and attributes need some room."""


def save_onnx(
    model: ir.Model, path: Path, *, external_above: int = EXTERNAL_DATA_BYTES
) -> tuple[Path, ...]:
    """Write a model to ``path``; weights go to ``<path>.data`` when they are too many.

    Returns:
        The files: the model, and its weights where they are apart.
    """
    size = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None
    )
    with replacing(path) as temporary:
        external = f"{path.name}.data" if size > external_above else None
        ir.save(model, temporary, external_data=external)
    return (path,) if external is None else (path, path.with_name(external))
