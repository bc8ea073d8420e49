"""Convert one QDQ file and compare every quantized tensor with ONNX Runtime's on the source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from lightning_qat import convert_qat_model
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann import AscendExecutor

Array = NDArray[Any]


def compared(path: Path, folder: Path, grid_weights: bool) -> dict[str, Any]:
    """What becomes of one file.

    Args:
        path: A QDQ file.
        folder: An empty place for the converted files.
        grid_weights: Take float weights that lie on a grid as integers.

    Returns:
        ``layers``: how many compute on integers; ``left_float``: remarks; ``tensors``: how many
        were compared; ``steps``: the largest difference of the executor from ONNX Runtime without
        optimizations; ``float_bias``: the same where biases stay float; ``lint``: errors.

    Raises:
        ValueError: It cannot be converted.
    """
    done = convert_qat_model(path, folder / "rounded", grid_weights=grid_weights)
    deploy = done.files["model"]
    steps = differences(path, deploy, folder)
    exact = convert_qat_model(path, folder / "exact", float_bias=True, grid_weights=grid_weights)
    findings = CannExporter().lint(deploy)
    return {
        "layers": len(done.layers),
        "left_float": list(done.left_float),
        "tensors": len(steps),
        "steps": max(steps.values()),
        "float_bias": max(differences(path, exact.files["model"], folder).values()),
        "lint": [str(found) for found in findings if found.severity == "error"],
    }


def differences(source: Path, deploy: Path, folder: Path) -> dict[str, float]:
    """Largest difference of each tensor that both files name, in steps of its own grid.

    Tensors are those that a QuantizeLinear reads, and the outputs. An output on no grid is measured
    in 255ths of its range.
    """
    original, converted = onnx.load(source), onnx.load(deploy)
    outputs = [output.name for output in original.graph.output]
    both = _tensors(original) & _tensors(converted)
    grids = {name: scale for name, scale in _grids(original).items() if name in both}
    names = [*outputs, *(name for name in grids if name not in outputs)]
    inputs = _inputs(original)
    wanted = _run(_showing(original, names, folder / "source.onnx"), names, inputs)
    executor = AscendExecutor(_showing(converted, names, folder / "deploy.onnx"))
    results = dict(zip(executor.output_names, executor.run(inputs), strict=True))
    found = {}
    for name, want in zip(names, wanted, strict=True):
        want, got = want.astype(np.float64), results[name].astype(np.float64)
        step = grids.get(name) or max(float(np.ptp(want)), 1e-12) / 255
        found[name] = float(np.abs(got - want).max()) / step
    return found


def _tensors(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output}


def _grids(model: onnx.ModelProto) -> dict[str, float]:
    """The scale that each computed tensor is rounded by, before it or behind it."""
    constants = _constants(model)
    outputs = {output.name for output in model.graph.output}
    found: dict[str, float] = {}
    for node in model.graph.node:
        rounded = node.op_type == "QuantizeLinear" and node.input[0] not in constants
        if rounded or (node.op_type == "DequantizeLinear" and node.output[0] in outputs):
            scale = constants.get(node.input[1])
            if scale is not None and scale.size == 1:
                found[node.input[0] if rounded else node.output[0]] = float(scale.reshape(()))
    return found


def _constants(model: onnx.ModelProto) -> dict[str, Array]:
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            found[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    return found


def _showing(model: onnx.ModelProto, names: list[str], path: Path) -> Path:
    """The model with more of its tensors as outputs."""
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
    onnx.save(model, path)
    return path


def _inputs(model: onnx.ModelProto) -> dict[str, Array]:
    """Random inputs; a dimension that is open is 2."""
    generator = np.random.default_rng(0)
    initializers = {tensor.name for tensor in model.graph.initializer}
    found: dict[str, Array] = {}
    for value in model.graph.input:
        if value.name not in initializers:
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            drawn = generator.normal(size=[d.dim_value or 2 for d in tensor.shape.dim])
            found[value.name] = (drawn if dtype.kind == "f" else 40 * abs(drawn)).astype(dtype)
    return found


def _run(path: Path, names: list[str], inputs: Mapping[str, Array]) -> list[Array]:
    """ONNX Runtime as the file is written."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(names, dict(inputs))]
