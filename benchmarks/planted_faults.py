"""Whether ``compare`` finds a fault that was planted in a file.

A network of twenty layers is quantized and exported. Then one number of its file is broken: the
scale of a layer's input grows by 10 %, a layer's bias becomes zero, or the integers of a weight are
shuffled. Counted is how often the first departure is that layer (for a scale: that tensor), with
the numbers that are read back and by the computed values alone.

    python -m benchmarks.planted_faults --plantings 20
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich import print as show
from torch import Tensor, nn

from lightning_qat import QuantizedModel, convert, export, prepare
from lightning_qat.export.load import load_exporter
from lightning_qat.export.protocol import Array, Artifact, Exporter
from lightning_qat.export.trace import Trace, Traceable
from lightning_qat.insight.compare import compare
from lightning_qat_exporters.tflite.flatbuffer.file import pack, unpack, view
from lightning_qat_exporters.tflite.flatbuffer.match_layers import match_layers

FAULTS = ("scale", "bias", "weight")


class Block(nn.Module):
    """Two convolutions with batch norms, and what they read added to what they give."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, channels, height, width), as ``x``."""
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + x)


def residual(blocks: int = 9) -> nn.Module:
    """``2 * blocks + 2`` layers; takes (batch, 3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        *(Block(8) for _ in range(blocks)),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def trained(blocks: int = 9, seed: int = 0) -> tuple[QuantizedModel, Tensor]:
    """A network of random weights, trained for five steps on noise, and inputs for it."""
    torch.manual_seed(seed)
    model, x = residual(blocks), torch.randn(8, 3, 8, 8)
    prepare(model, "int8", x)
    optimizer = torch.optim.SGD(model.train().parameters(), 0.05)
    for _ in range(5):
        loss = nn.functional.cross_entropy(model(torch.randn(32, 3, 8, 8)), torch.arange(32) % 10)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has none here
        optimizer.step()
    return convert(model.eval(), x), x


def plant(model: QuantizedModel, path: Path, fault: str, rng: random.Random) -> str:
    """Break one number of a file and return the name of its layer."""
    if path.suffix == ".tflite":
        return _plant_in_tflite(model, path, fault, rng)
    proto = onnx.load(path)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    layer = rng.choice(model.layers).name
    quant = [node for node in proto.graph.node if node.name == f"{layer}.quant"]
    if fault == "scale" and quant:
        scale = next(a for a in quant[0].attribute if a.name == "scale")
        scale.f *= 1.1
    else:
        suffix = {"scale": "input_scale", "bias": "bias", "weight": "weight"}[fault]
        name = next(n for n in stored if n in (f"{layer}.{suffix}", f"{layer}.{suffix}_transposed"))
        values = _broken(fault, numpy_helper.to_array(stored[name]), rng)
        stored[name].CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(proto, path)
    return layer


def _plant_in_tflite(model: QuantizedModel, path: Path, fault: str, rng: random.Random) -> str:
    file = unpack(path.read_bytes())
    shown = view(file)
    graph = file.subgraphs[0]
    layer, found = rng.choice([(one, other) for one, other in match_layers(shown, model) if other])
    assert found is not None
    assert found.source is not None
    assert found.bias is not None
    if fault == "scale":
        tensor = graph.tensors[shown.tensors.index(found.source)]
        tensor.quantization = copy.copy(tensor.quantization)
        scale = np.asarray(tensor.quantization.scale, np.float32)
        tensor.quantization.scale = _broken(fault, scale, rng).tolist()
    else:
        place = found.bias if fault == "bias" else found.weight
        buffer = file.buffers[graph.tensors[place].buffer]
        buffer.data = _broken(fault, np.asarray(buffer.data), rng)
    path.write_bytes(pack(file))
    return layer.name


def _broken(fault: str, values: Array, rng: random.Random) -> Array:
    if fault == "scale":
        return np.asarray(values * np.float32(1.1), np.float32)
    if fault == "bias":
        return np.zeros_like(values)
    shuffled = np.random.default_rng(rng.randrange(2**32)).permutation(values.reshape(-1))
    return shuffled.reshape(values.shape)


class ValuesAlone:
    """An exporter whose numbers cannot be read back.

    Args:
        exporter: The exporter that runs the file.
    """

    def __init__(self, exporter: Exporter) -> None:
        assert isinstance(exporter, Traceable)
        self.name, self.traced_runtime = exporter.name, exporter.traced_runtime
        self._exporter = exporter
        self.export, self.check_available = exporter.export, exporter.check_available

    def trace(
        self,
        artifact: Artifact,
        inputs: Mapping[str, Array],
        given: Mapping[str, Array] | None = None,
    ) -> Trace:
        """As the exporter."""
        assert isinstance(self._exporter, Traceable)
        return self._exporter.trace(artifact, inputs, given)


def is_found(
    model: QuantizedModel, artifact: Artifact, x: Tensor, exporter: Exporter, fault: str, layer: str
) -> bool:
    """Whether the first departure is the broken layer, or the tensor of the broken scale."""
    departure = compare(model, artifact, x, exporter=exporter).departure
    if departure is None:
        return False
    if fault != "scale":
        return departure.made_by == layer
    keys = {one.input_key for one in model.layers if one.name == layer}
    return departure.name in keys


def count(target: str, plantings: int, report: Callable[[str], None] = print) -> Counter[str]:
    """How many of the plantings in one target's file are found, by the way they are found."""
    model, x = trained()
    exporter, found, rng = load_exporter(target), Counter[str](), random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        artifact = export(model, target, Path(folder) / "net")
        path = artifact.files["model"]
        content = path.read_bytes()
        for number in range(plantings):
            fault = FAULTS[number % len(FAULTS)]
            path.write_bytes(content)
            layer = plant(model, path, fault, rng)
            for way, reader in (("numbers", exporter), ("values", ValuesAlone(exporter))):
                if is_found(model, artifact, x, reader, fault, layer):
                    found[way] += 1
                else:
                    report(f"{target}: not found by {way}: {fault} of {layer}")
    return found


def main() -> None:
    """Print a line per target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plantings", type=int, default=20, help="per target (default: 20)")
    parser.add_argument(
        "--targets", nargs="+", default=["fake_quant_onnx", "cann", "tflite"], metavar="TARGET"
    )
    options = parser.parse_args()
    for target in options.targets:
        found = count(target, options.plantings)
        show(
            f"{target}: {found['numbers']} of {options.plantings} found in the right layer; "
            f"{found['values']} by values alone"
        )


if __name__ == "__main__":
    main()
