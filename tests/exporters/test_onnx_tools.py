"""Files of the ONNX exporters pass the strictest checks, and simplifying tools keep them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from lightning_qat.export.export import export
from tests.exporters.contract import converted
from tests.models import NETWORKS

ROLES = {"fake_quant_onnx": "model", "cann": "fake_quant"}


@pytest.fixture(scope="module")
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, target = request.param
    artifact = export(converted(network), target, tmp_path_factory.mktemp(network) / "net")
    return artifact.files[ROLES[target]]


EVERY_FILE = pytest.mark.parametrize(
    "file",
    [(network, target) for network in NETWORKS for target in ROLES],
    indirect=True,
    ids=lambda value: f"{value[0]}-{value[1]}",
)


def outputs(model: Any) -> list[Any]:
    """ONNX Runtime without optimizations, on random inputs of the file's shapes."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    content = model if isinstance(model, str) else model.SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        shape = [size if isinstance(size, int) else 2 for size in value.shape]
        feeds[value.name] = rng.normal(size=shape).astype(np.float32)
    return list(session.run(None, feeds))


@EVERY_FILE
def test_onnx_s_own_checks_pass_at_their_strictest(file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    # No name of torch's exporter is left, and no node has none.
    names = [node.name for node in model.graph.node]
    assert [n for n in names if not n or n.startswith(("val_", "node_", "_empty"))] == []


@pytest.mark.parametrize("tool", ["onnxslim", "onnxsim"])
@EVERY_FILE
def test_a_simplified_file_computes_the_same(tool: str, file: Path) -> None:
    module = pytest.importorskip(tool, reason=f"{tool} is not installed")
    simplified = module.slim(str(file)) if tool == "onnxslim" else module.simplify(str(file))[0]
    for own, theirs in zip(outputs(str(file)), outputs(simplified), strict=True):
        np.testing.assert_array_equal(own, theirs)
