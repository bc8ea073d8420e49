"""Files with joins compute what the trained model computes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import as_arrays
from lightning_qat.export.verify import verify
from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import as_fake_quantize
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from tests.join_networks import CNNS, FULL, NETWORKS, inputs_for, train_steps
from tests.joins.cases import converted


def steps_apart(
    model: QuantizedModel, target: str, runtime: str, x: Tensor, folder: Path
) -> np.ndarray[Any, Any]:
    """How far every element of every output of a file is from torch's, in output steps."""
    artifact, exporter = export(model, target, folder / "net"), load_exporter(target)
    assert verify(model, artifact, exporter=exporter).parameters_equal
    reference = as_arrays(model.flat_outputs(model(x)))
    found = exporter.run(artifact, runtime, as_arrays(model.flat_inputs((x,), {})))  # type: ignore[attr-defined]
    assert model.output_steps.keys() == reference.keys()
    return np.concatenate(
        [
            (np.abs(reference[name] - found[name]) / model.output_steps[name]).ravel()
            for name in reference
        ]
    )


@pytest.mark.parametrize("network", NETWORKS)
def test_a_trained_network_converts_to_what_it_computes(network: str) -> None:
    x = inputs_for(network, 8)
    model = NETWORKS[network][0]()
    prepare(model, "int8", x)
    quantized = convert(train_steps(model, x), x)
    assert list(quantized.output_steps) == list(quantized.output_names)
    with torch.no_grad():
        unfusable = (quantized(x) - model(x)).abs() / quantized.output_steps["output"]
    # Batch norm is folded: another order of float32 operations, seldom on the other side of a
    # rounding point.
    assert (unfusable <= 2).float().mean() >= 0.99


# The next two in one worker: one conversion and one translation serve both.
@pytest.mark.xdist_group("files of joins")
@pytest.mark.parametrize("network", NETWORKS)
def test_onnx_runtime_computes_what_torch_does(network: str, tmp_path: Path) -> None:
    x = inputs_for(network, 16)
    runtime = "onnxruntime, no optimizations"
    unfusable = steps_apart(converted(network), "fake_quant_onnx", runtime, x, tmp_path)
    assert np.mean(unfusable <= 2.001) >= 0.99


@pytest.mark.xdist_group("files of joins")
@pytest.mark.parametrize("network", [*CNNS, *FULL])
def test_cann_s_deploy_file_computes_what_torch_does(network: str, tmp_path: Path) -> None:
    x = inputs_for(network, 16)
    unfusable = steps_apart(converted(network), "cann", "reference executor", x, tmp_path)
    assert np.mean(unfusable <= 2.001) >= 0.99


# No tensor has two quantizers

PASSING = {
    *("reshape", "view", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("max_pool2d", "relu", "relu_", "permute", "transpose", "slice", "select", "pad"),
    *("constant_pad_nd", "cat", "stack", "upsample_nearest2d", "dropout", "expand", "contiguous"),
    *("clone", "detach", "chunk", "split", "getitem"),
}


def operator_of(node: fx.Node) -> str:
    name = getattr(node.target, "_overloadpacket", node.target)
    return str(getattr(name, "__name__", name)).rpartition(".")[2]


def quantized_sources(node: fx.Node) -> set[fx.Node]:
    """The ``fake_quantize`` nodes whose values a node holds."""
    if as_fake_quantize(node) is not None:
        return {node}
    if node.op != "call_function" or operator_of(node) not in PASSING:
        return set()
    operand: Any = node.args[0]
    nodes = operand if isinstance(operand, list | tuple) else [operand]
    return set().union(*(quantized_sources(n) for n in nodes))


def numbers(model: QuantizedModel, node: fx.Node) -> tuple[float, int]:
    call = as_fake_quantize(node)
    assert call is not None
    scale, zero_point = map(Constants(model.program).value, (call.scale, call.zero_point))
    assert scale is not None
    assert zero_point is not None
    return float(scale), int(zero_point)


@pytest.mark.parametrize("network", NETWORKS)
def test_no_quantized_tensor_is_quantized_again_to_other_numbers(network: str) -> None:
    model = converted(network)
    quantizers = [n for n in model.program.graph.nodes if as_fake_quantize(n) is not None]
    assert quantizers
    again = [
        (str(node.args[-1]), str(source.args[-1]))
        for node in quantizers
        for source in quantized_sources(node.args[0])
        if numbers(model, node) != numbers(model, source)
    ]
    assert again == []
