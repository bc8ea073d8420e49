"""``torch.onnx.export(dynamo=False)`` of a QAT model: the exporter that many scripts call."""

import io
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare


def trained(recipe: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    x = torch.randn(8, 1, 6, 6)
    prepare(model, recipe, x)
    for _ in range(3):
        model(x).square().mean().backward()
    return model.eval(), x


@pytest.mark.parametrize("recipe", ["int8", "amct", {"weight": {"quantizer": "learned"}}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_file_computes_the_model(recipe: Any) -> None:
    model, x = trained(recipe)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False, opset_version=17)
    kinds = [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]
    assert kinds.count("DequantizeLinear") >= 4
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(file.getvalue(), options)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = model(x).detach().numpy()
    # A value between two integers may round to the other one where sums have another order.
    step = (wanted.max() - wanted.min()) / 200
    assert np.abs(found - wanted).max() <= step
    assert np.mean(np.abs(found - wanted) < 1e-5) > 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_other_bits_are_refused_with_the_remedy() -> None:
    model, x = trained({"weight": {"bits": 4}})
    with pytest.raises(ValueError, match=r"quantizers of 8 bits only; .* -8 to 7. .* dynamo=True"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False, opset_version=17)
