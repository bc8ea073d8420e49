"""Biases in the file are the model's integers, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.export import export
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
