"""ONNX Runtime computes convolutional networks in integers, from the first layer to the last."""

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.protocol import as_arrays
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.exporters.exact_sums import ExactSums
from tests.join_networks import FULL, NETWORKS, inputs_for, train_steps

# One worker converts each network once, and each session optimizes it once.
pytestmark = pytest.mark.xdist_group("joins in ONNX Runtime")

INTEGER = ("resnet8", "mobilenet_v2", "dense_block", "unet", "inception")
"""Networks of which nothing is float between the first layer and the last."""

COMPUTES = {
    *("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul", "Add", "Sub", "Mul", "Concat", "Sigmoid"),
    *("AveragePool", "GlobalAveragePool", "ReduceMean", "Relu", "Clip", "Softmax"),
}
"""Float operators that have an integer form, under every name that ONNX Runtime gives them."""

EXPECTED = {
    "resnet8": {"QLinearConv": 8, "QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "resnet20": {"QLinearConv": 21, "QLinearAdd": 9, "QLinearGlobalAveragePool": 1, "QGemm": 1},
    "mobilenet_v2": {
        **{"QLinearConv": 11, "QLinearAdd": 2, "QLinearGlobalAveragePool": 1, "QGemm": 1}
    },
    # The first of three concatenations has one input and vanishes.
    "dense_block": {
        **{"QLinearConv": 4, "QLinearConcat": 2, "QLinearAveragePool": 1},
        **{"QLinearGlobalAveragePool": 1, "QGemm": 1},
    },
    "unet": {"QLinearConv": 6, "QLinearConcat": 2},
    "inception": {
        **{"QLinearConv": 6, "QLinearConcat": 1, "QLinearAveragePool": 1},
        **{"QLinearGlobalAveragePool": 1, "QGemm": 1},
    },
}

LEVELS = {
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "default": ort.SessionOptions().graph_optimization_level,
}


@functools.cache
def converted(network: str) -> QuantizedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = inputs_for(network)
        model = (NETWORKS | FULL)[network][0]()
        prepare(model, "int8", x)
        return convert(train_steps(model, x), x)


@functools.cache
def optimized(network: str, level: str, of_all: Path) -> onnx.ModelProto:
    """What ONNX Runtime makes of a network's file."""
    folder = of_all / network / level
    artifact = export(converted(network), FakeQuantOnnxExporter(), folder / "net")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = LEVELS[level]
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(artifact.files["model"]), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("joins")


CASES = [*((network, level) for network in INTEGER for level in LEVELS)]


@pytest.mark.parametrize(("network", "level"), [*CASES, *((name, "default") for name in FULL)])
def test_every_node_that_computes_is_an_integer_one(network: str, level: str, folder: Path) -> None:
    found = Counter(node.op_type for node in optimized(network, level, folder).graph.node)
    assert {name: count for name, count in found.items() if name in COMPUTES} == {}
    assert {n: c for n, c in found.items() if n.startswith("Q") and n != "QuantizeLinear"} == (
        EXPECTED[network]
    )


@pytest.mark.parametrize(("network", "level"), CASES)
def test_one_quantization_at_the_input_and_one_dequantization_at_the_output(
    network: str, level: str, folder: Path
) -> None:
    graph = optimized(network, level, folder).graph
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    dequantize = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert [node.input[0] for node in quantize] == [graph.input[0].name]
    assert [node.output[0] for node in dequantize] == [graph.output[0].name]


@pytest.mark.parametrize("level", LEVELS)
def test_gates_and_joins_of_a_squeeze_excite_block_are_integer(level: str, folder: Path) -> None:
    # ONNX Runtime has no integer form of hardswish and hardsigmoid.
    found = Counter(n.op_type for n in optimized("mobilenet_v3_block", level, folder).graph.node)
    names = ("QLinearConv", "QLinearGlobalAveragePool", "QLinearMul", "QLinearAdd")
    assert [found[name] for name in names] == [5, 1, 1, 1]
    assert found["Conv"] + found["FusedConv"] + found["Add"] == 0


@pytest.mark.parametrize("network", [*INTEGER, *FULL])
def test_the_default_session_computes_what_torch_does(network: str, tmp_path: Path) -> None:
    model, x = converted(network), inputs_for(network, 16)
    # Added exactly on every CPU: saturating sums were 3 and 7 steps away in two of these networks.
    exporter = ExactSums()
    artifact = export(model, exporter, tmp_path / "net")
    expected = as_arrays(model.flat_outputs(model(x)))["output"]
    inputs = as_arrays(model.flat_inputs((x,), {}))
    runtime = next(r for r in exporter.runtimes if r == "onnxruntime")
    found = exporter.run(artifact, runtime, inputs)["output"]
    unfusable = np.abs(found - expected) / model.output_steps["output"]
    assert np.mean(unfusable <= 2.001) >= 0.99
