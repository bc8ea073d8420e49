"""Convolutions of every kind, from torch to ONNX Runtime and to our CANN executor."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat import QuantizedModel, convert, export, prepare, verify
from lightning_qat_exporters import CannExporter
from tests.exporters.exact_sums import ExactSums

# One worker converts each layer once, for both targets.
pytestmark = pytest.mark.xdist_group("convolutions")

CASES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, dilation=2), (4, 9)),
    "conv1d depthwise": (nn.Conv1d(4, 6 * 4, 3, groups=4), (4, 9)),
    "conv3d": (nn.Conv3d(4, 6, (1, 3, 3), stride=(1, 2, 1), padding=1), (4, 3, 5, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (4, 5)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=(1, 0)),
        (4, 5, 5),
    ),
    "conv_transpose2d without bias": (
        nn.ConvTranspose2d(4, 6, 2, dilation=2, bias=False),
        (4, 5, 5),
    ),
    "conv_transpose2d grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
    "conv_transpose3d": (nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 3, 3, 3)),
}
EXPORTERS = {"fake_quant_onnx": ExactSums, "cann": CannExporter}
NORMS = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def converted(layer: nn.Module, shape: tuple[int, ...], recipe: Any = "int8") -> QuantizedModel:
    """The layer with a batch norm whose factors have both signs, trained a little."""
    channels: Any = layer.out_channels
    norm = NORMS[len(shape) + 1](channels)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    model = nn.Sequential(layer, norm, nn.ReLU())
    x = torch.randn(3, *shape)
    prepare(model, recipe, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    return convert(model, x)


@functools.cache
def quantized(name: str, granularity: str = "per_channel") -> QuantizedModel:
    """One of the cases, the same one for every test: exporters leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        recipe = {"preset": "int8", "weight": {"granularity": granularity}}
        return converted(*CASES[name], recipe)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("target", ["fake_quant_onnx", "cann"])
def test_every_runtime_agrees_with_torch(
    name: str, granularity: str, target: str, tmp_path: Path
) -> None:
    model = quantized(name, granularity)
    artifact = export(model, target, tmp_path / "net")
    agreement = verify(model, artifact, exporter=EXPORTERS[target]())
    assert agreement.parameters_equal, agreement
    for runtime in agreement.runtimes:
        assert runtime.max_steps <= 1.01, agreement
        assert all(output.fraction_differing <= 0.02 for output in runtime.outputs), agreement


@pytest.mark.parametrize("name", [name for name in CASES if "grouped" not in name])
def test_a_batch_norm_after_it_is_folded(name: str) -> None:
    targets = {node.target for node in quantized(name).program.graph.nodes}
    assert torch.ops.aten.batch_norm.default not in targets


def test_a_batch_norm_after_a_grouped_transposed_convolution_folds() -> None:
    """Every output channel has its scale, which takes that channel's factor."""
    graph = quantized("conv_transpose2d grouped").program.graph
    assert torch.ops.aten.batch_norm.default not in {node.target for node in graph.nodes}
