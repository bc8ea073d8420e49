"""An ONNX Runtime that cuts off where QuantizeLinear of float16 rounds is not believed."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat.export.protocol import CannotRun
from lightning_qat_exporters.cann import CannExporter
from lightning_qat_exporters.onnx_files.run import OnnxSession


def quantizing(dtype: type, constant: bool = False) -> bytes:
    """A model that quantizes its input of a type with a step of 1."""
    scale = numpy_helper.from_array(np.array(1, dtype), "scale")
    nodes = [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], name="q")]
    stored = [numpy_helper.from_array(np.array(0, np.int8), "zero")]
    if constant:
        nodes.insert(0, helper.make_node("Constant", [], ["scale"], value=scale))
    else:
        stored.append(scale)
    real = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", real, [3])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [3])],
        stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize("constant", [False, True])
def test_an_older_onnx_runtime_is_refused_for_float16(
    constant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.29.0")
    model = quantizing(np.float16, constant)
    with pytest.raises(CannotRun, match=r"1\.29\.0 cuts off .*'q'.*Install onnxruntime>=1\.30"):
        OnnxSession(model, optimize=False)
    path = tmp_path / "half.onnx"
    path.write_bytes(model)
    with pytest.raises(ValueError, match=r"cannot run .*half\.onnx.* onnxruntime>=1\.30"):
        CannExporter().run_file(path, {"x": np.zeros(3, np.float16)})


def test_float32_runs_in_every_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.22.0")
    session = OnnxSession(quantizing(np.float32), optimize=False)
    x = np.array([0.25, 0.75, -1.5], np.float32)
    assert session.run({"x": x})["y"].tolist() == [0, 1, -2]


def test_this_onnx_runtime_rounds_float16_or_is_refused() -> None:
    x = np.array([0.25, 0.75, -1.5], np.float16)
    try:
        session = OnnxSession(quantizing(np.float16), optimize=False)
    except CannotRun:
        return
    assert session.run({"x": x})["y"].tolist() == [0, 1, -2]
