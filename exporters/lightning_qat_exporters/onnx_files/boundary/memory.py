"""How much memory the tensors of a model may take, those of its file and those made of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx import ModelProto

from lightning_qat_exporters.onnx_files.boundary.stored_data import external_files

ALWAYS = 2**30
"""Bytes that any model may take, however small its file is."""
PER_STORED = 16
"""Bytes that a model may take for each that is stored: a weight of 4 bits is written as float32,
and a few layers may share one."""


class MemoryBudget:
    """Bytes that the tensors of one model may take, counted before or as they are made.

    Args:
        proto: The model.
        path: Its file.
        max_bytes: What the user allows; ``None``: 16 times what is stored, and 1 GiB in any case.
    """

    def __init__(self, proto: ModelProto, path: Path, max_bytes: int | None = None) -> None:
        self._path, self._taken = path, 0
        if max_bytes is None:
            files = (path, *(path.parent / name for name in external_files(proto)))
            stored = sum(file.stat().st_size for file in files)
            max_bytes = max(ALWAYS, PER_STORED * stored)
        self._limit = max_bytes

    def take(self, count: int, what: str) -> None:
        """Count bytes.

        Args:
            count: So many more.
            what: What takes them, in the plural, for the message.

        Raises:
            ValueError: They are more than is left.
        """
        self._taken += count
        if self._taken > self._limit:
            raise ValueError(
                f"The tensors of {str(self._path)!r} must take at most {self._limit} bytes in "
                f"memory, for a small file may ask for all of it; with {what} they take "
                f"{self._taken}. If that is meant, allow more: max_bytes={2 * self._taken} of "
                f"convert_qat_model, --max-bytes {2 * self._taken} of lightning-qat convert."
            )


BUDGET = "lightning_qat.memory_budget"
"""Where a model that was read keeps its budget: a key of ``meta``."""


def budget_of(model: ir.Model) -> MemoryBudget:
    """What is left for a model that ``read_onnx`` has read."""
    budget = model.meta[BUDGET]
    assert isinstance(budget, MemoryBudget)
    return budget
