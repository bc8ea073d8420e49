"""How fast deploy models run, in the executor and in ONNX Runtime, beside the fake-quant model.

    OMP_NUM_THREADS=1 python -m benchmarks.executor

A ResNet-20 on batches of digits (8 by 8) and of larger images; the three take turns on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from benchmarks.joins import ResNet20
from lightning_qat import convert, export, prepare
from lightning_qat.export.protocol import Array
from lightning_qat_exporters.cann import AscendExecutor
from lightning_qat_exporters.cann.standard_operators.translate import as_standard_operators
from lightning_qat_exporters.onnx_files.read import read_onnx
from lightning_qat_exporters.onnx_files.write import save_onnx


def files(shape: tuple[int, ...], folder: Path) -> dict[str, Path]:
    """The deploy model and the fake-quant model of a network that saw some batches."""
    torch.manual_seed(0)
    net = ResNet20().train()
    prepare(net, "int8", torch.randn(shape))
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(shape))
    return dict(export(convert(net, torch.randn(shape)), "cann", folder / "net").files)


def as_standard(path: Path) -> Path:
    """The deploy model as standard operators, beside it."""
    model = read_onnx(path)
    as_standard_operators(model)
    return save_onnx(model, path.with_name("standard.onnx"))[0]


def in_onnx_runtime(path: Path) -> Callable[[dict[str, Array]], Any]:
    """A model on one thread, with ONNX Runtime's optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda feed: session.run(None, feed)


def seconds(run: Callable[[dict[str, Array]], Any], feed: dict[str, Array]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run(feed)
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print("batch               executor   ONNX Runtime   ratio   fake-quant model")
    for shape in ((64, 3, 8, 8), (256, 3, 8, 8), (8, 3, 32, 32)):
        with tempfile.TemporaryDirectory() as folder:
            made = files(shape, Path(folder))
            executor = AscendExecutor(made["model"])
            runs = (
                executor.run,
                in_onnx_runtime(as_standard(made["model"])),
                in_onnx_runtime(made["fake_quant"]),
            )
            x = torch.randn(shape).numpy()
            feed: dict[str, Array] = {executor.input_names[0]: np.asarray(x)}
            times = [[seconds(run, feed) for run in runs] for _ in range(rounds + 1)][1:]
        own, deploy, fake = (1000 * statistics.median(c) for c in zip(*times, strict=True))
        print(f"{shape!s:18s} {own:7.1f} ms {deploy:11.1f} ms {own / deploy:7.2f} {fake:15.1f} ms")


if __name__ == "__main__":
    main()
