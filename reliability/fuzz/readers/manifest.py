"""The manifest of an export folder, as the report reads it."""

import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from lightning_qat.convert.convert import convert
from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.prepare.prepare import prepare
from lightning_qat.report.collect import collect
from lightning_qat.report.folder import find_model, read_manifest
from lightning_qat.report.page import render
from lightning_qat_exporters import FakeQuantOnnxExporter
from reliability.fuzz.mutate_text import mutate_json
from reliability.fuzz.reader import Reader

_TRAINING = {
    "loss": [[0, 1.5], [1, 0.25]],
    "phases": [[0, "calibrate"], [1, "quantize"]],
    "weight_sqnr_db": {"0": 41.25},
    "left_float": [["1", "ReLU", "no weights"]],
}


@cache
def _model() -> QuantizedModel:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.linspace(-1, 1, 32).reshape(8, 4)
    prepare(net, example_inputs=x)
    net(x)
    return convert(net.eval(), x)


def _seeds(folder: Path) -> Sequence[Path]:
    export_all(_model(), [FakeQuantOnnxExporter()], folder, "net", training=_TRAINING)
    return [folder / "manifest.json"]


def _read(path: Path) -> None:
    with TemporaryDirectory(dir=path.parent) as folder:
        (Path(folder) / "manifest.json").write_bytes(path.read_bytes())
        (Path(folder) / "net.pt2").touch()
        manifest = read_manifest(Path(folder))
        find_model(Path(folder), manifest)
        # The page takes far longer than all else.
        if zlib.crc32(path.read_bytes()) % 10 == 0:
            render(collect(_model(), manifest, Path(folder), "net", compare=False))


READER = Reader("manifest", _seeds, mutate_json, _read, (ValueError,))
