"""How fast and how large the files are: LiteRT and ONNX Runtime, int8 and float, in one run.

    python -m benchmarks.latency

A ResNet-20 on one thread with batch 1; the four files take turns, so that noise of the machine hits
all alike. Then the sizes of a network whose bytes are weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from ai_edge_litert.interpreter import Interpreter
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.joins import ResNet20
from lightning_qat import convert, export, prepare
from lightning_qat_exporters import TFLiteExporter


def float_tflite(net: nn.Module, x: Tensor, path: Path) -> Path:
    """What litert-torch makes of the float network, in LiteRT's layout."""
    import litert_torch

    if x.dim() == 4:
        net, x = litert_torch.to_channel_last_io(net, args=[0]).eval(), x.permute(0, 2, 3, 1)
    path.write_bytes(litert_torch.convert(net, (x,)).model_content())
    return path


def float_onnx(net: nn.Module, x: Tensor, path: Path) -> Path:
    """What torch makes of the float network."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    torch.onnx.export(net, (x,), path, dynamo=True, verbose=False)
    return path


def quantized(net: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """The int8 files, by target."""
    prepare(net.train(), "int8", x)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, *x.shape[1:]))
    model = convert(net, x)
    targets = {"fake_quant_onnx": "fake_quant_onnx", "tflite": TFLiteExporter()}
    return {
        name: export(model, target, folder / "net").files["model"]  # type: ignore[arg-type]
        for name, target in targets.items()
    }


def in_litert(path: Path, x: Tensor) -> Callable[[], Any]:
    """One inference in LiteRT."""
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    interpreter.set_tensor(
        interpreter.get_input_details()[0]["index"], x.permute(0, 2, 3, 1).numpy()
    )
    return interpreter.invoke  # type: ignore[no-any-return]


def in_onnx_runtime(path: Path, x: Tensor) -> Callable[[], Any]:
    """One inference in ONNX Runtime."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def latency(rounds: int, folder: Path) -> None:
    """Print the time of one inference with each file."""
    torch.manual_seed(0)
    net, x = ResNet20(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 32, 32))
    net.eval()
    files = [
        float_tflite(net, x, folder / "float.tflite"),
        float_onnx(net, x, folder / "float.onnx"),
    ]
    int8 = quantized(net, x, folder)
    runs = {
        "LiteRT, float": in_litert(files[0], x),
        "LiteRT, int8": in_litert(int8["tflite"], x),
        "ONNX Runtime, float": in_onnx_runtime(files[1], x),
        "ONNX Runtime, int8": in_onnx_runtime(int8["fake_quant_onnx"], x),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), "inferences", console=Console(stderr=True), transient=True):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(own) for name, own in times.items()}
    print(f"ResNet-20, one thread, batch 1, median of {rounds}; over LiteRT's int8")
    for name, seconds in median.items():
        print(f"  {name:20} {seconds * 1e3:6.2f} ms  {seconds / median['LiteRT, int8']:.2f}")


def sizes(folder: Path) -> None:
    """Print what int8 saves of a file that is mostly weights."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(512, 512), nn.ReLU())))
    x = torch.randn(1, 512)
    whole = float_tflite(net.eval(), x, folder / "linears.tflite").stat().st_size
    small = quantized(net, x, folder / "linears")["tflite"].stat().st_size
    print(f"three Linear(512, 512): int8 {small:,} bytes, {small / whole:.3f} of float TFLite")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=300, help="inferences (default: 300)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    with tempfile.TemporaryDirectory() as temporary:
        latency(options.rounds, Path(temporary))
        sizes(Path(temporary))
