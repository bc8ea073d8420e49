"""What ONNX Runtime's own quantizer writes converts whole and computes the same, op by op."""

from __future__ import annotations

import functools
import itertools
import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from lightning_qat import Conversion, convert_qat_model
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.cann.normalize.normalize import normalize
from lightning_qat_exporters.cann.qdq_graph.match import find_quantized
from lightning_qat_exporters.onnx_files.read import read_onnx
from tests.join_networks import NETWORKS, inputs_for, train_steps

# One worker quantizes and converts each model once.
pytestmark = pytest.mark.xdist_group("quantize_static")

Array = NDArray[Any]
Int8, UInt8 = QuantType.QInt8, QuantType.QUInt8
# Activations, weights, one scale per channel, symmetric.
FORMS = {
    "int8, per tensor, symmetric": (Int8, Int8, False, True),
    "uint8, int8 weights, per channel": (UInt8, Int8, True, False),
    "uint8, per tensor": (UInt8, UInt8, False, False),
    "int8, per channel, symmetric": (Int8, Int8, True, True),
}
TAKEN = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add")


class Batches(CalibrationDataReader):  # type: ignore[misc]
    """Two random batches."""

    def __init__(self, name: str, network: str) -> None:
        self._batches: Iterator[dict[str, Any]] = iter(
            [{name: inputs_for(network).numpy()} for _ in range(2)]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)


ALL_FORMS = ("resnet8", "encoder_block")
"""Convolutions, a Gemm and sums; matrix products. Other networks take one of the forms in turn."""
OTHERS = [network for network in NETWORKS if network not in ALL_FORMS]
CASES = [
    *((network, form) for network in ALL_FORMS for form in FORMS),
    *zip(OTHERS, itertools.cycle(FORMS)),
]


@functools.cache
def float_file(network: str, folder: Path) -> Path:
    path = folder / f"{network}.onnx"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        x = inputs_for(network)
        model = train_steps(NETWORKS[network][0](), x)
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return path


@pytest.fixture(scope="module")
def float_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("float")


@dataclass(frozen=True)
class Case:
    """One model of ONNX Runtime's quantizer, what became of it, and every tensor on a batch."""

    source: Path
    model: onnx.ModelProto
    done: Conversion
    x: dict[str, Array]
    tensors: dict[str, Array]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, float_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    (network, form), folder = request.param, tmp_path_factory.mktemp("qdq")
    given = float_file(network, float_files)
    name = onnx.load(given).graph.input[0].name
    activation, weight, per_channel, symmetric = FORMS[form]
    source = folder / "qdq.onnx"
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it advises to prepare the model first
    quantize_static(
        given,
        source,
        Batches(name, network),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=activation,
        weight_type=weight,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": symmetric},
    )
    logging.root.setLevel(level)
    model, x = onnx.load(source), {name: inputs_for(network).numpy()}
    done = convert_qat_model(source, folder / "net")
    return Case(source, model, done, x, every_tensor(model, x))


def every_tensor(model: onnx.ModelProto, x: dict[str, Array]) -> dict[str, Array]:
    """All that ONNX Runtime computes, as the model is written."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    shown.graph.output.extend(
        helper.make_empty_tensor_value_info(name)
        for name in {*names} - {value.name for value in model.graph.output}
    )
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return {**x, **dict(zip(names, map(np.asarray, session.run(names, x)), strict=True))}


def test_every_quantized_operator_is_matched(case: Case) -> None:
    model, done = case.model, case.done
    real = {out for n in model.graph.node if n.op_type == "DequantizeLinear" for out in n.output}
    wanted = {n.name for n in model.graph.node if n.op_type in TAKEN and real & set(n.input)}
    assert wanted <= {*done.layers, *done.joins}
    with_weight = {
        n.name
        for n in model.graph.node
        if n.op_type in TAKEN[:-1]
        and any(n.input[1] == d.output[0] and is_stored(model, d) for d in dequantizes(model))
    }
    assert set(done.layers) == with_weight


def test_outputs_are_one_step_apart(case: Case) -> None:
    (actual,) = AscendExecutor(case.done.files["model"]).run(case.x)
    expected = case.tensors[case.model.graph.output[0].name]
    assert np.abs(actual - expected).max() <= 1.001 * output_step(case.model)


def test_every_operator_on_onnx_runtimes_own_inputs_is_one_step_apart(case: Case) -> None:
    deploy = onnx.load(case.done.files["model"])
    quants = {n.name: n for n in deploy.graph.node if n.op_type == "AscendQuant"}
    # Which node of the source each of them is; what is quantized again on its way has none there.
    found = find_quantized(normalize(read_onnx(case.source)))
    of = {
        f"{activation.name}.quant": activation.quantizes[0].outputs[0].name
        for activation in found.activations
        if activation.quantizes[0].outputs[0].name in case.tensors
    }
    assert of.keys() <= quants.keys()
    feeds = {}
    for name, integers in of.items():
        (read,) = (n for n in dequantizes(case.model) if n.input[0] == integers)
        feeds[quants[name].input[0]] = case.tensors[read.output[0]]
    assert len(feeds) == len(of)
    for name, integers in of.items():
        part = operators_before(deploy, quants[name], feeds)
        inputs = {v.name: feeds.get(v.name, case.x.get(v.name)) for v in part.graph.input}
        (actual,) = AscendExecutor(part).run(inputs)
        expected = case.tensors[integers]
        shift = 128 if expected.dtype == np.uint8 else 0
        distance = np.abs(actual.astype(int) - (expected.astype(int) - shift))
        assert distance.max() <= 1, name


def operators_before(
    model: onnx.ModelProto, last: onnx.NodeProto, given: Collection[str]
) -> onnx.ModelProto:
    """What computes a quantized tensor from given tensors that are quantized before."""
    maker = {output: node for node in model.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    taken, inputs, used, waiting = {last.output[0]}, set(), set(), list(last.input)
    while waiting:
        name = waiting.pop()
        if name in constants:
            used.add(name)
        elif name not in maker or (name in given and name != last.input[0]):
            inputs.add(name)
        elif maker[name].output[0] not in taken:
            taken.add(maker[name].output[0])
            waiting += [i for i in maker[name].input if i]
    graph = helper.make_graph(
        [node for node in model.graph.node if node.output[0] in taken],
        "part",
        [helper.make_empty_tensor_value_info(name) for name in inputs],
        [helper.make_empty_tensor_value_info(last.output[0])],
        [constants[name] for name in used],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)


def dequantizes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "DequantizeLinear"]


def is_stored(model: onnx.ModelProto, dequantize: onnx.NodeProto) -> bool:
    return dequantize.input[0] in {tensor.name for tensor in model.graph.initializer}


def output_step(model: onnx.ModelProto) -> float:
    (last,) = (n for n in model.graph.node if n.output[0] == model.graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    (scale,) = (t for t in model.graph.initializer if t.name == last.input[1])
    return float(numpy_helper.to_array(scale))
