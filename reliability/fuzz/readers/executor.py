"""Deploy files, as the reference executor computes them."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_qat import convert, export, prepare
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.cann.executor.executor import AscendExecutor
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_protobuf import mutate_protobuf
from reliability.fuzz.reader import Reader

_LIMIT = 2**26
"""Bytes that the tensors of an input may take: what is mutated declares much, and needs little."""
_MOST = 2**20
"""Elements of the arrays that are given; a file may declare inputs of any size."""


class _Network(nn.Module):
    """A convolution, a join, pools, what moves values, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=True)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.pool, self.mean = nn.MaxPool2d(2), nn.AvgPool2d(2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        y = self.pool(self.up(y)) + y
        y = torch.cat([self.mean(y), self.pool(y)], 1).reshape(-1, 8, 4).transpose(1, 2)
        result: Tensor = torch.softmax(self.fc(y.flatten(1).reshape(-1, 16)), -1)
        return result


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.lstm(x)[0]
        return result


def seeds(folder: Path) -> Sequence[Path]:
    """Deploy models of a small network and of an LSTM as the device's node."""
    torch.manual_seed(0)
    files = []
    for name, network, x, exporter in (
        ("network", _Network(), torch.rand(1, 2, 4, 4), CannExporter()),
        ("device", _Recurrent(), torch.rand(1, 1, 3), CannExporter(rnn="device")),
    ):
        prepare(network, example_inputs=x)
        network(x)
        files.append(export(convert(network, x), exporter, folder / name).files["model"])
    return files


def mutate(content: bytes, generator: random.Random) -> bytes:
    """Break fields of the message, or now and then bytes."""
    if generator.random() < 0.1:
        return mutate_bytes(content, generator)
    model = onnx.ModelProto.FromString(content)
    mutate_protobuf(model, generator)
    written: bytes = model.SerializeToString()
    return written


def arrays_for(path: Path) -> dict[str, NDArray[np.generic]]:
    """An array for each input of a model."""
    return {value.name: _array(value) for value in onnx.load(path).graph.input}


def _array(value: onnx.ValueInfoProto) -> NDArray[np.generic]:
    """An array of an input's declared type and sizes, where these are few."""
    tensor = value.type.tensor_type
    sizes = [dim.dim_value if 0 < dim.dim_value < _MOST else 1 for dim in tensor.shape.dim]
    sizes = sizes if np.prod(sizes, dtype=float) < _MOST else [1] * len(sizes)
    try:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    except KeyError:
        dtype = np.dtype(np.float32)
    return np.linspace(-1, 1, int(np.prod(sizes)), dtype=np.float32).reshape(sizes).astype(dtype)


def read(path: Path) -> None:
    """Compute the model on arrays of the sizes that it declares."""
    executor = AscendExecutor(path, max_bytes=_LIMIT)
    inputs = arrays_for(path)
    executor.run({name: inputs[name] for name in executor.input_names})


READER = Reader("executor", seeds, mutate, read, (ValueError, FileNotFoundError))
