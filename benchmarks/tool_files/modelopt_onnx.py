"""NVIDIA ModelOpt on ONNX files."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from modelopt.onnx.quantization import quantize

from benchmarks.tool_files.float_onnx import Batches, float_files
from benchmarks.tool_files.tool import Write


def files() -> Iterator[tuple[str, Write]]:
    """Every net by both calibrations."""
    for name, source, batches in float_files():
        for method in ("entropy", "max"):
            yield f"{name}_{method}", partial(_quantize, source, batches, method)


def _quantize(source: Path, batches: Batches, method: str, path: Path) -> None:
    data = {"x": np.concatenate([batch["x"] for batch in batches])}
    quantize(
        str(source), quantize_mode="int8", calibration_data=data, calibration_method=method,
        calibration_eps=["cpu"], high_precision_dtype="fp32", output_path=str(path),
    )  # fmt: skip
