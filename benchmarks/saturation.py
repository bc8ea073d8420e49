"""What the 8-bit products of CPUs without VNNI cost, and what it costs to avoid it.

Such CPUs add pairs of uint8 x int8 products in 16 bits, which saturate. For each seed a network is
trained on scikit-learn's digits, in float and then quantized, with weights of 8 and of 7 bits, and
both files run in ONNX Runtime: without optimizations, in its default session, and with the session
option ``session.x64quantprecision``; in OpenVINO as well where it is installed. Given are
the test accuracy, its standard error, the mean difference to the float network trained as long, how
many test images are predicted as the file says (the session without optimizations), and the largest
difference in output steps. ``--time`` measures what a ResNet-18 takes in each session.

    python -m benchmarks.saturation --seeds 10
    python -m benchmarks.saturation --time
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from rich import print as show
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.accuracy import EPOCHS, RATE, accuracy, calibrate, data, network, train, with_error
from benchmarks.nets import resnet18
from lightning_qat import Recipe, WeightSpec, convert, export, prepare
from lightning_qat.export.protocol import Array, Artifact
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges
from lightning_qat_exporters import FakeQuantOnnxExporter
from lightning_qat_exporters.onnx_files.run import has_vnni

EXACT = "session.x64quantprecision"


def session(path: Path, *, optimize: bool = True, exact: bool = False) -> ort.InferenceSession:
    """A session on one thread."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if exact:
        options.add_session_config_entry(EXACT, "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def in_session(made: ort.InferenceSession) -> Callable[[Tensor], Array]:
    """The first output for the first input."""
    name = made.get_inputs()[0].name
    return lambda x: np.asarray(made.run(None, {name: x.numpy()})[0])


def runs(artifact: Artifact) -> dict[str, Callable[[Tensor], Array]]:
    """Every way to run a file, by name; the first computes what is written."""
    path = artifact.files["model"]
    ways = {
        "as written": in_session(session(path, optimize=False)),
        "default": in_session(session(path)),
        "x64quantprecision": in_session(session(path, exact=True)),
    }
    exporter = FakeQuantOnnxExporter()
    if "openvino" in exporter.runtimes:
        name = session(path).get_inputs()[0].name
        ways["OpenVINO"] = lambda x: next(
            iter(exporter.run(artifact, "openvino", {name: x.numpy()}).values())
        )
    return ways


def quantized(checkpoint: nn.Module, x: Tensor, y: Tensor, bits: int, seed: int) -> nn.Module:
    """A float network trained on with ``bits`` bits for weights and every tensor quantized."""
    model = copy.deepcopy(checkpoint)
    prepare(model, Recipe(weight=WeightSpec(bits=bits)), x[:2])
    calibrate(model, x, seed)
    apply_phase(model, Phase("quantize", True, True, False))
    train(model, x, y, EPOCHS, RATE, seed)
    return model.eval()


def on_digits(seeds: int, folder: Path) -> Table:
    """The accuracies."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    floats = []
    for seed in track(range(seeds), "seeds"):
        torch.manual_seed(seed)
        x, y, x_test, y_test = data(seed)
        checkpoint = network()
        train(checkpoint, x, y, 40, 3e-3, seed)
        longer = copy.deepcopy(checkpoint)
        train(longer, x, y, EPOCHS, RATE, seed)
        floats.append(accuracy(longer, x_test, y_test))
        for bits in (8, 7):
            model = convert(quantized(checkpoint, x, y, bits, seed), x_test[:4])
            artifact = export(model, "fake_quant_onnx", folder / f"w{bits}_{seed}")
            (step,) = model.output_steps.values()
            outputs = {name: run(x_test) for name, run in runs(artifact).items()}
            literal = outputs["as written"]
            for name, output in outputs.items():
                right = 100 * float(np.mean(output.argmax(1) == y_test.numpy()))
                same = 100 * float(np.mean(output.argmax(1) == literal.argmax(1)))
                steps = float(np.abs(output - literal).max() / step)
                row = (right, right - floats[-1], same, steps)
                found.setdefault(f"W{bits}A8, {name}", []).append(row)
    table = Table("file, run in", "accuracy %", "to float", "same %", "most steps")
    table.add_row("float, torch", with_error(floats), "", "", "")
    for name, rows in found.items():
        accuracies, gains, agreeing, most = (list(column) for column in zip(*rows, strict=True))
        table.add_row(
            name, with_error(accuracies), with_error(gains, "+"),
            f"{statistics.mean(agreeing):.2f}", f"{max(most):.0f}",
        )  # fmt: skip
    return table


def times(folder: Path, rounds: int = 9) -> Table:
    """Milliseconds of a ResNet-18 on 32x32 pictures, batch 8, in each session."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 32, 32)
    float_file = folder / "float.onnx"
    with warnings.catch_warnings():  # torch's use of its own deprecated LeafSpec
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(resnet18().eval(), (x,), float_file, verbose=False)
    ways = {"float": in_session(session(float_file))}
    for bits in (8, 7):
        model = resnet18()
        prepare(model, Recipe(weight=WeightSpec(bits=bits)), x[:2])
        model.train()
        with torch.no_grad():
            for _ in range(2):
                model(x)
                commit_ranges(model)
        artifact = export(convert(model.eval(), x), "fake_quant_onnx", folder / f"resnet_{bits}")
        ways |= {f"W{bits}A8, {way}": run for way, run in runs(artifact).items()}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            if name.endswith("OpenVINO"):  # It is compiled anew at every run.
                continue
            began = time.perf_counter()
            run(x)
            took[name].append(1e3 * (time.perf_counter() - began))
    table = Table("ResNet-18, batch 8, one thread", "ms", "of float")
    least = {name: statistics.median(values) for name, values in took.items() if values}
    for name, value in least.items():
        table.add_row(name, f"{value:.1f}", f"{value / least['float']:.2f}")
    return table


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many networks (default: 3)")
    parser.add_argument("--time", action="store_true", help="times instead of accuracies")
    options = parser.parse_args()
    show(f"onnxruntime {ort.__version__}, {'with' if has_vnni() else 'no'} VNNI on this CPU")
    with tempfile.TemporaryDirectory() as name:
        show(times(Path(name)) if options.time else on_digits(options.seeds, Path(name)))


if __name__ == "__main__":
    main()
