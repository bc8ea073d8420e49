"""What ONNX Runtime's own quantizer writes converts whole and computes the same."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from lightning_qat import convert_qat_model
from lightning_qat_exporters._ascend_executor import AscendExecutor
from tests.join_networks import NETWORKS, inputs_for, train_steps

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


@pytest.fixture(scope="module", params=NETWORKS)
def float_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float") / f"{request.param}.onnx"
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        x = inputs_for(request.param)
        model = train_steps(NETWORKS[request.param][0](), x)
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_every_quantized_operator_is_matched_and_outputs_are_one_step_apart(
    float_file: Path, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    network = float_file.stem
    name = onnx.load(float_file).graph.input[0].name
    activation, weight, per_channel, symmetric = FORMS[form]
    source = tmp_path / "qdq.onnx"
    quantize_static(
        float_file,
        source,
        Batches(name, network),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        activation_type=activation,
        weight_type=weight,
        extra_options={"ActivationSymmetric": symmetric, "WeightSymmetric": symmetric},
    )
    done = convert_qat_model(source, tmp_path / "net")

    model = onnx.load(source)
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

    x = {name: inputs_for(network).numpy()}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, x)
    (actual,) = AscendExecutor(done.files["model"]).run(x)
    assert np.abs(actual - expected).max() <= 1.001 * output_step(model)


def dequantizes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [n for n in model.graph.node if n.op_type == "DequantizeLinear"]


def is_stored(model: onnx.ModelProto, dequantize: onnx.NodeProto) -> bool:
    return dequantize.input[0] in {tensor.name for tensor in model.graph.initializer}


def output_step(model: onnx.ModelProto) -> float:
    (last,) = (n for n in model.graph.node if n.output[0] == model.graph.output[0].name)
    assert last.op_type == "DequantizeLinear"
    (scale,) = (t for t in model.graph.initializer if t.name == last.input[1])
    return float(numpy_helper.to_array(scale))
