"""An exporter of one's own: the integers of a chain of Linear and ReLU, and NumPy that runs them.

    python -m examples.own_exporter

``export`` writes the file, ``differences`` reads it back, ``run`` runs it and ``trace`` shows the
tensors inside, for ``verify`` and ``compare``. An entry point gives it a name (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_qat import Agreement, Comparison, compare, convert, export, prepare, verify
from lightning_qat.atomic_write import replacing
from lightning_qat.export.protocol import Array, Artifact, Unsupported, UnsupportedByTarget
from lightning_qat.export.trace import Trace, TracedTensor
from lightning_qat.ir.ops import DEQUANTIZE, FAKE_QUANTIZE, key_of
from lightning_qat.ir.quantized_model import QuantizedModel

Arrays = Mapping[str, Array]
LINEAR, RELU = torch.ops.aten.linear.default, torch.ops.aten.relu.default


def numbers(model: QuantizedModel) -> dict[str, Array]:
    """Every number of the converted model, all of them final: an exporter computes none."""
    found: dict[str, Array] = {}
    for key, tensor in model.tensors.items():
        q = tensor.qparams
        if tensor.integers is None:
            found[key] = np.array([q.scale.item(), q.zero_point.item(), q.grid.qmin, q.grid.qmax])
        else:
            found[key], found[f"{key}.scale"] = tensor.integers.numpy(), q.scale.numpy()
    biases = {f"{layer.weight_key}.bias": layer.bias for layer in model.layers}
    return found | {k: np.zeros(1) if b is None else b.numpy() for k, b in biases.items()}


class NumpyExporter:
    name, traced_runtime, runtimes = "numpy", "NumPy", ("NumPy",)

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        steps, problems = [], []
        weights = {layer.node: layer.weight_key for layer in model.layers}
        for node in model.program.graph.nodes:
            key = key_of(node) or weights.get(node.name)
            if node.target is RELU or (node.target in (FAKE_QUANTIZE, LINEAR) and key):
                steps.append(f"{node.target} {key}")
            elif node.op == "call_function" and node.target is not DEQUANTIZE:
                problems.append(Unsupported(node.name, "must be a quantized Linear or a ReLU"))
        if problems:
            raise UnsupportedByTarget(self.name, problems)
        path = path_prefix.with_name(f"{path_prefix.name}.npz")
        with replacing(path) as temporary, temporary.open("wb") as file:  # never half a file
            np.savez(file, steps=np.array(steps), **numbers(model))  # type: ignore[arg-type]
        return Artifact(self.name, {"model": path}, integers=frozenset(model.tensors))

    def differences(self, model: QuantizedModel, artifact: Artifact) -> tuple[str, ...]:
        file, wanted = np.load(artifact.files["model"]), numbers(model)
        return tuple(f"{k} differs" for k, v in wanted.items() if not np.array_equal(file[k], v))

    def run(self, artifact: Artifact, runtime: str, inputs: Arrays) -> dict[str, Array]:
        return dict(self.trace(artifact, inputs).outputs)

    def trace(self, artifact: Artifact, inputs: Arrays, given: Arrays | None = None) -> Trace:
        file, tensors, integers, step = np.load(artifact.files["model"]), [], np.zeros(1), 1.0
        x: Any = next(iter(inputs.values()))
        for operator, key in map(str.split, file["steps"]):
            if operator == str(RELU):
                x = np.maximum(x, 0)
            elif operator == str(LINEAR):
                x = integers @ file[key].T.astype(np.int64)
                x = x * (step * file[f"{key}.scale"]) + file[f"{key}.bias"]
            else:
                step, zero, low, high = file[key]
                own = (np.rint(x / step) + zero).clip(low, high) - zero
                tensors.append(TracedTensor(key, step, int(zero), own * step, (key,)))
                x = (given or {}).get(key, own * step)  # what readers of the tensor get
                integers = np.rint(x / step).astype(np.int64)
        return Trace(tuple(tensors), {"output": x})


def main(out: Path = Path("qat_export")) -> tuple[Agreement, Comparison]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x, exporter = torch.randn(256, 8), NumpyExporter()
    prepare(net, "int8", x)
    net(x)  # stands for the training
    artifact = export(model := convert(net, x), exporter, out / "net")
    return verify(model, artifact, x, exporter), compare(model, artifact, x, exporter=exporter)


if __name__ == "__main__":
    print(*main(), sep="\n")
