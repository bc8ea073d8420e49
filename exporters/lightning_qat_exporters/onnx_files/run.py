"""Run an ONNX file in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.half_rounding import refuse_cut_halves


def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating; unknown counts as yes."""
    if not cpuinfo.is_file():
        return True
    flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    return "avx2" not in flags or "vnni" in flags


class OnnxSession:
    """An ONNX file in ONNX Runtime, on the CPU.

    Args:
        file: The ONNX file, or its bytes.
        optimize: ONNX Runtime's default graph optimizations; without them every node is computed
            as it is written.

    Raises:
        CannotRun: The installed ONNX Runtime is known to compute the file wrongly.
    """

    def __init__(self, file: Path | bytes, *, optimize: bool) -> None:
        refuse_cut_halves(file)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = ["CPUExecutionProvider"]
        model = str(file) if isinstance(file, Path) else file
        self._session = ort.InferenceSession(model, options, providers=providers)

    @property
    def inputs(self) -> dict[str, tuple[str, list[int | str | None]]]:
        """Type in ONNX Runtime's words, and shape, of each input by name."""
        return {i.name: (i.type, i.shape) for i in self._session.get_inputs()}

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays by output name, from arrays by input name."""
        names = [output.name for output in self._session.get_outputs()]
        outputs: Any = self._session.run(names, dict(inputs))
        return dict(zip(names, outputs, strict=True))


def run_onnx(path: Path, inputs: Mapping[str, Array], *, optimize: bool) -> dict[str, Array]:
    """Run a file on a batch; see ``OnnxSession``."""
    return OnnxSession(path, optimize=optimize).run(inputs)
