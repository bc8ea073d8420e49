"""Biases in the file are the model's integers, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
from lightning_qat.export.verify import verify
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat_exporters import TFLiteExporter
from lightning_qat_exporters.tflite.flatbuffer.file import read
from lightning_qat_exporters.tflite.flatbuffer.match_layers import match_layers
from tests.models import trained

pytest.importorskip("litert_torch")
pytestmark = pytest.mark.xdist_group("tflite")


def test_biases_between_two_integers_are_rounded_as_the_model_rounds_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 512), nn.ReLU(), nn.Linear(512, 2)), torch.randn(8, 4)
    first = trained(net, x)[0]
    layer = convert(net, x).layers[0]
    tensors = convert(net, x).tensors
    step = tensors[layer.input_key].qparams.scale * tensors[layer.weight_key].qparams.scale
    with torch.no_grad():
        first.bias.copy_((torch.arange(512) * 37 - 9000 + 0.5) * step)
    model = convert(net, x)
    artifact = export(model, TFLiteExporter(backend="litert"), tmp_path / "net")
    file = read(artifact.files["model"].read_bytes())
    (layer, stored), _ = match_layers(file, model)
    assert stored is not None
    assert stored.bias is not None
    expected = quantize_bias(
        layer.bias,
        model.tensors[layer.input_key].qparams.scale,
        model.tensors[layer.weight_key].qparams.scale,
    )
    values = torch.tensor(file.tensors[stored.bias].data).long()
    assert int((values != expected).sum()) == 0
    assert TFLiteExporter().differences(model, artifact) == ()


class Prior(nn.Module):
    """A layer whose bias is one number, as of a detector's classes, before a second one."""

    def __init__(self, layer: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.layer, self.last = layer, last
        assert isinstance(layer.bias, nn.Parameter)
        nn.init.constant_(layer.bias, -4.595)
        layer.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.layer(x))
        return result


@pytest.mark.parametrize(
    ("make", "last", "shape"),
    [
        (lambda: nn.Linear(4, 9), lambda: nn.Linear(9, 2), (8, 4)),
        (lambda: nn.Conv2d(3, 9, 3), lambda: nn.Conv2d(9, 2, 1), (2, 3, 5, 5)),
        (lambda: nn.Conv2d(6, 6, 3, groups=6), lambda: nn.Conv2d(6, 2, 1), (2, 6, 5, 5)),
        (lambda: nn.ConvTranspose2d(3, 5, 2), lambda: nn.Conv2d(5, 2, 1), (2, 3, 5, 5)),
    ],
    ids=["linear", "convolution", "depthwise", "transposed"],
)
def test_a_bias_of_one_number_has_each_channel_s_own_integer(
    make: Callable[[], nn.Module],
    last: Callable[[], nn.Module],
    shape: tuple[int, ...],
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = convert(trained(Prior(make(), last()), x), x)
    first = model.layers[0]
    assert first.bias is not None
    assert len(first.bias.unique()) == 1
    exporter = TFLiteExporter(backend="litert")
    artifact = export(model, exporter, tmp_path / "net")
    assert exporter.differences(model, artifact) == ()
    agreement = verify(model, artifact, (x,), exporter)
    assert all(runtime.max_steps <= 1.001 for runtime in agreement.runtimes), str(agreement)
