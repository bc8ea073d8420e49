"""Time and memory of ``convert_qat_model`` against the number of nodes, and for 100 MB of weights.

    python benchmarks/convert_onnx.py

Each model is a chain of quantized convolutions; time should grow linearly with the nodes. Memory is
the growth of a fresh process's peak over what it was after a small conversion.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import convert_qat_model


def chain(layers: int, channels: int, *, stored: bool) -> onnx.ModelProto:
    """Quantized 1x1 convolutions and relus: 6 nodes a layer, 7 with float weights."""
    generator = np.random.default_rng(0)
    constants: dict[str, NDArray[np.generic]] = {
        "scale": np.array(0.05, np.float32),
        "zero": np.array(3, np.int8),
        "weight_zero": np.zeros(channels, np.int8),
        "weight_scale": np.full(channels, 0.01, np.float32),
    }
    nodes, x = [], "x"
    factors = ["weight_scale", "weight_zero"]
    for n in range(layers):
        weight = generator.integers(-127, 128, (channels, channels, 1, 1))
        constants[f"w{n}"] = (
            weight.astype(np.int8) if stored else (weight * 0.01).astype(np.float32)
        )
        integers = f"w{n}"
        if not stored:
            integers = f"wq{n}"
            nodes.append(
                helper.make_node("QuantizeLinear", [f"w{n}", *factors], [integers], axis=0)
            )
        nodes += [
            helper.make_node("DequantizeLinear", [integers, *factors], [f"wd{n}"], axis=0),
            helper.make_node("QuantizeLinear", [x, "scale", "zero"], [f"q{n}"]),
            helper.make_node("DequantizeLinear", [f"q{n}", "scale", "zero"], [f"d{n}"]),
            helper.make_node("Conv", [f"d{n}", f"wd{n}"], [f"c{n}"], name=f"conv{n}"),
            helper.make_node("Relu", [f"c{n}"], [f"r{n}"], name=f"relu{n}"),
        ]
        x = f"r{n}"
    shape = [1, channels, 4, 4]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def peak() -> float:
    """Largest resident size of this process so far, in MB.

    From Linux's own table: ``ru_maxrss`` begins at the size of the process that started this one.
    """
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


def seconds_of(path: Path) -> float:
    """Seconds of one conversion."""
    start = time.perf_counter()
    convert_qat_model(path, path.with_name("converted"), path.with_name("record.txt"))
    return time.perf_counter() - start


def measure(path: Path) -> tuple[float, float]:
    """Seconds, and growth of the peak in MB; to be run in a fresh process."""
    small = path.with_name("small.onnx")
    onnx.save(chain(1, 8, stored=True), small)
    seconds_of(small)
    before = peak()
    return seconds_of(path), peak() - before


def main() -> None:
    """Print the tables."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chain.onnx"
        print("nodes  seconds  ms per node")
        for nodes in (10, 100, 1000, 10000):
            onnx.save(chain(nodes // 5, 8, stored=True), path)
            seconds = seconds_of(path)
            print(f"{nodes:5d}  {seconds:7.3f}  {1000 * seconds / nodes:.2f}")
        for name, stored, layers in (("float", False, 25), ("int8", True, 100)):
            onnx.save(chain(layers, 1024, stored=stored), path)
            size = path.stat().st_size / 1e6
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                seconds, grown = fresh.submit(measure, path).result()
            print(
                f"{size:.0f} MB, {name} weights: {seconds:.2f} s, {grown / size:.1f} times its size"
            )


if __name__ == "__main__":
    main()
