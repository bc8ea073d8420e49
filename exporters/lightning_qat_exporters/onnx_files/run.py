"""Run an ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from lightning_qat.export.protocol import Array


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating; unknown counts as yes."""
    if not cpuinfo.is_file():
        return True
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx2" not in flags or "vnni" in flags


def run_onnx(path: Path, inputs: Mapping[str, Array], *, optimize: bool) -> dict[str, Array]:
    """Run a file on a batch, on the CPU.

    Args:
        path: The ONNX file.
        inputs: Arrays by input name.
        optimize: ONNX Runtime's default graph optimizations; without them every node is computed
            as it is written.

    Returns:
        Arrays by output name.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    outputs: Any = session.run(names, dict(inputs))
    return dict(zip(names, outputs, strict=True))
