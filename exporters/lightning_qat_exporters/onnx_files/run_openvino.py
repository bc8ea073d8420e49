"""Run an ONNX file in OpenVINO, where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from lightning_qat.export.protocol import Array, CannotRun


def has_openvino() -> bool:
    """Whether the package ``openvino`` is installed; nothing is imported."""
    return importlib.util.find_spec("openvino") is not None


def run_openvino(path: Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run a file on a batch in OpenVINO's CPU plugin; what is float there is computed in float32.

    Args:
        path: The ONNX file.
        inputs: Arrays by input name.

    Returns:
        Arrays by output name.

    Raises:
        CannotRun: OpenVINO refuses the file.
    """
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    try:
        # Else CPUs with bfloat16 instructions compute in bfloat16 what stays float.
        compiled = core.compile_model(
            core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        results = compiled(dict(inputs))
    except RuntimeError as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        # Its first lines are places in its own source.
        telling = [line for line in said if not line.startswith("Exception from")]
        raise CannotRun("openvino", " ".join(telling or said)) from error
    return {name: results[port] for port in compiled.outputs for name in port.get_names()}
