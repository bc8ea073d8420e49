"""Brevitas with weights and inputs of 4 and 2 bits."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.tool_files import brevitas_qcdq
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net with either number of bits."""
    return brevitas_qcdq.files(brevitas_qcdq.FEW_BITS)
