"""How much memory the tensors of a model may take, those of its file and those made of them."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from lightning_qat_exporters.onnx_files.boundary.stored_data import external_files

ALWAYS = 2**30
"""Bytes that any model may take, however small its file is."""
PER_STORED = 16
"""Bytes that a model may take for each that is stored: a weight of 4 bits is written as float32,
and a few layers may share one."""


def memory_limit(proto: ModelProto, path: Path, max_bytes: int | None = None) -> int:
    """Most bytes that the tensors of a model may take, each counted by itself.

    Args:
        proto: The model.
        path: Its file.
        max_bytes: What the user allows; ``None``: 16 times what is stored, and 1 GiB in any case.
    """
    if max_bytes is not None:
        return max_bytes
    files = (path, *(path.parent / name for name in external_files(proto)))
    return max(ALWAYS, PER_STORED * sum(file.stat().st_size for file in files))


def check_memory(needed: int, limit: int, path: Path) -> None:
    """Check what tensors take against the limit.

    Raises:
        ValueError: It is more.
    """
    if needed > limit:
        raise ValueError(
            f"The tensors of {str(path)!r} must take at most {limit} bytes in memory, for it may "
            f"be a small file that asks for all memory; they take {needed}. If that is meant, "
            f"allow it: max_bytes={needed} in Python, --max-bytes {needed} on the command line."
        )
