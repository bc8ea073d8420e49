"""TFLite files: ``inspect``, and the numbers that ``verify`` compares. LiteRT runs none of them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat_exporters.tflite.exporter import TFLiteExporter
from lightning_qat_exporters.tflite.inspect import inspect_tflite
from reliability.fuzz.mutate_tflite import mutate_tflite
from reliability.fuzz.reader import Reader

_MODELS: list[QuantizedModel] = []
"""The model that the whole file was made of."""


def _seeds(folder: Path) -> Sequence[Path]:
    x = torch.linspace(-1, 1, 72).reshape(2, 1, 6, 6)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    prepare(network, "int8", x)
    network.train()(x)
    model = convert(network.eval(), x)
    artifact = TFLiteExporter(backend="litert").export(model, folder / "net")
    _MODELS[:] = [model]
    return [artifact.files["model"]]


def _read(path: Path) -> object:
    artifact = Artifact("tflite", {"model": path})
    return inspect_tflite(path), TFLiteExporter().differences(_MODELS[0], artifact)


READER = Reader("tflite", _seeds, mutate_tflite, _read, (ValueError,))
