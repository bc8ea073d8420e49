"""What constants alone determine is computed before layers are looked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from lightning_qat import convert_qat_model, prepare
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from lightning_qat_exporters.cann.normalize.fold_constants import FoldConstants
from tests.models import shake_batchnorms

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[Any], constants: dict[str, Any], inputs: tuple[str, ...] = ("x",)
) -> onnx.ModelProto:
    graph = oh.make_graph(
        nodes,
        "graph",
        [oh.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in inputs],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [nh.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 18)])


def folded(model: onnx.ModelProto, **options: Any) -> ir.Model:
    found = ir.from_proto(model)
    FoldConstants(**options)(found)
    return found


WEIGHT = RNG.normal(size=(3, 4)).astype(np.float32)
SCALED = [
    oh.make_node("Abs", ["w"], ["abs"]),
    oh.make_node("ReduceMax", ["abs"], ["max"], keepdims=0),
    oh.make_node("Div", ["max", "levels"], ["scale"]),
    oh.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"]),
    oh.make_node("DequantizeLinear", ["q", "scale", "zero"], ["real"]),
    oh.make_node("MatMul", ["x", "real"], ["y"]),
]
CONSTANTS = {"w": WEIGHT, "levels": np.float32(127), "zero": np.int8(0)}


@pytest.mark.parametrize("qparams_only", [True, False])
def test_a_scale_becomes_an_initializer_and_the_pair_stays(qparams_only: bool) -> None:
    graph = folded(model_of(SCALED, CONSTANTS), qparams_only=qparams_only).graph
    quantize, dequantize, product = list(graph)[-3:]
    assert [n.op_type for n in (quantize, dequantize, product)] == [n.op_type for n in SCALED[3:]]
    scale = quantize.inputs[1]
    assert scale is dequantize.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert float(scale.const_value.numpy()) == np.float32(np.abs(WEIGHT).max()) / np.float32(127)
    assert product.inputs[1] is dequantize.outputs[0]


def test_a_weight_that_is_computed_becomes_an_initializer() -> None:
    """As weight normalisation computes it: ``g * v / |v|``."""
    nodes = [
        oh.make_node("ReduceL2", ["w"], ["norm"], keepdims=1),
        oh.make_node("Div", ["w", "norm"], ["v"]),
        oh.make_node("Mul", ["v", "levels"], ["weight"]),
        oh.make_node("QuantizeLinear", ["weight", "levels", "zero"], ["q"]),
        *SCALED[4:],
    ]
    nodes[4] = oh.make_node("DequantizeLinear", ["q", "levels", "zero"], ["real"])
    graph = folded(model_of(nodes, CONSTANTS)).graph
    (quantize,) = (node for node in graph if node.op_type == "QuantizeLinear")
    weight = quantize.inputs[0]
    assert weight is not None
    assert weight.const_value is not None
    expected = 127 * WEIGHT / np.linalg.norm(WEIGHT)
    np.testing.assert_allclose(weight.const_value.numpy(), expected, rtol=1e-6)


def test_what_an_input_determines_and_random_numbers_stay() -> None:
    nodes = [
        oh.make_node("RandomNormalLike", ["w"], ["noise"]),
        oh.make_node("Add", ["noise", "w"], ["noisy"]),
        oh.make_node("MatMul", ["x", "noisy"], ["y"]),
    ]
    graph = folded(model_of(nodes, {"w": WEIGHT})).graph
    assert [node.op_type for node in graph] == [node.op_type for node in nodes]
    assert [*graph.initializers] == ["w"]


LINE = np.ones(3_000, np.float32)
TOO_LARGE = {
    "outer sum": ([oh.make_node("Add", ["column", "row"], ["z"])], {}),
    "expanded": ([oh.make_node("Expand", ["row", "size"], ["z"])], {"size": [3_000_000, 3_000]}),
    "doubled": (
        [oh.make_node("Concat", [f"z{i}"] * 2, [f"z{i + 1}"], axis=0) for i in range(40)]
        + [oh.make_node("Identity", ["z40"], ["z"])],
        {"z0": LINE},
    ),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_file_cannot_make_us_compute_more_than_it_holds(name: str) -> None:
    nodes, constants = TOO_LARGE[name]
    constants = {"row": LINE, "column": LINE[:, None], **constants}
    nodes = [*nodes, oh.make_node("Mul", ["x", "z"], ["y"])]
    graph = folded(model_of(nodes, constants)).graph
    assert set(graph.initializers) == set(constants)


def test_an_illegal_node_stays_for_whoever_reads_it() -> None:
    nodes = [
        oh.make_node("Reshape", ["w", "size"], ["z"]),
        oh.make_node("Mul", ["x", "z"], ["y"]),
    ]
    graph = folded(model_of(nodes, {"w": WEIGHT, "size": [5, 5]})).graph
    assert [*graph.initializers] == ["w", "size"]


def vgg() -> nn.Sequential:
    """Every weight has more than 8,192 elements: torch's exporter folds none of their scales."""
    return nn.Sequential(
        nn.Conv2d(3, 40, 9, padding=4, bias=False),
        nn.BatchNorm2d(40),
        nn.ReLU(),
        nn.Conv2d(40, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 32, 3, stride=2),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 9 * 9, 8),
        nn.ReLU(),
        nn.Linear(8, 1200),
    )


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize("recipe", [{"joins": False, "outputs": False}, "amct"], ids=str)
def test_a_network_of_large_weights_converts_whole(tmp_path: Path, recipe: Any) -> None:
    torch.manual_seed(0)
    model, x = vgg(), torch.randn(2, 3, 6, 6)
    prepare(model, recipe, x)
    shake_batchnorms(model)
    with torch.no_grad():
        for norm in (model[1], model[4], model[7]):
            # AMCT's -128 has no opposite for a negative one.
            norm.weight.abs_()  # type: ignore[operator]
    model.train()
    for _ in range(2):
        model(x).sum().backward()
    with torch.no_grad():
        live = model.eval()(x).numpy()
    torch.onnx.export(model, (x,), tmp_path / "qat.onnx", verbose=False)
    kinds = Counter(n.op_type for n in onnx.load(tmp_path / "qat.onnx").graph.node)
    assert kinds["Div"] + kinds["Abs"] > 0, "scales are left to be computed"
    done = convert_qat_model(tmp_path / "qat.onnx", tmp_path / "vgg")
    assert "5 layers on integers" in str(done)
    assert "0 left real" in str(done)
    deploy = onnx.load(tmp_path / "vgg_deploy_model.onnx")
    assert not {"BatchNormalization", "DequantizeLinear", "Div", "Abs"} & {
        node.op_type for node in deploy.graph.node
    }
    session = ort.InferenceSession(str(tmp_path / "vgg_fake_quant_model.onnx"))
    simulated: Any = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    executor = AscendExecutor(tmp_path / "vgg_deploy_model.onnx")
    (deployed,) = executor.run({executor.input_names[0]: x.numpy()})
    np.testing.assert_allclose(deployed, simulated, rtol=0, atol=1e-4)
    # A few values at ties fall to the other side.
    assert np.abs(deployed - live).mean() < 0.01 * np.ptp(live)
