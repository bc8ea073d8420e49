"""NNCF on ONNX files."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nncf
import onnx

from benchmarks.tool_files.float_onnx import Batches, float_files
from benchmarks.tool_files.tool import Write

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "mixed": {"preset": nncf.QuantizationPreset.MIXED},
    "transformer": {"model_type": nncf.ModelType.TRANSFORMER},
}


def files() -> Iterator[tuple[str, Write]]:
    """Every net with every set of options."""
    for name, source, batches in float_files():
        for tag, options in OPTIONS.items():
            yield f"{name}_{tag}", partial(_quantize, source, batches, options)


def _quantize(source: Path, batches: Batches, options: dict[str, Any], path: Path) -> None:
    onnx.save(nncf.quantize(onnx.load(source), nncf.Dataset(batches), **options), path)
