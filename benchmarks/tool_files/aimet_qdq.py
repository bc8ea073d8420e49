"""AIMET's quantization simulation, exported as QDQ by ``aimet_torch.onnx.export``."""

# pyright: reportMissingImports=false

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.tool_files.nets import Recurrent, batches, nets
from benchmarks.tool_files.tool import Write
from benchmarks.zoo_models.torchvision_operators import declare_torchvision_operators

declare_torchvision_operators()  # AIMET imports torchvision.

import aimet_torch  # noqa: E402
import aimet_torch.onnx  # noqa: E402
from aimet_torch.model_preparer import prepare_model  # noqa: E402


def files() -> Iterator[tuple[str, Write]]:
    """Every net with weights as float and as integers, activations of either sign."""
    for name, net, x in nets():
        yield f"{name}_default", partial(_quantize, net, x, False)
        yield f"{name}_integers", partial(_quantize, net, x, True)


def _quantize(net: nn.Module, x: Tensor, integers: bool, path: Path) -> None:
    model = copy.deepcopy(net).eval()
    if not isinstance(net, Recurrent):  # torch.fx does not trace into an LSTM.
        model = prepare_model(model)
    sim = aimet_torch.QuantizationSimModel(model, x)

    def run(model: nn.Module) -> None:
        for batch in batches(x):
            model(batch)

    with torch.no_grad():
        sim.compute_encodings(run)
    aimet_torch.onnx.export(
        sim.model, (x,), str(path), input_names=["x"], output_names=["y"], opset_version=21,
        dynamo=False, prequantize_constants=integers,
        force_activation_as="signed" if integers else "unsigned",
    )  # fmt: skip
