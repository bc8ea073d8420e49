"""Time and memory of `prepare`, `convert` and the exporters, against what torch itself takes.

    python -m benchmarks.export                     # all of it, some minutes
    python -m benchmarks.export --only layers       # or: exports, targets, memory

layers: residual networks of 10, 100 and 1,000 convolutions with batch norm and relu. `prepare` and
`convert` should take the same time per layer at every size; what `torch.export` takes of it is
printed apart. Times are those of the processor, so that other programs do not count.

exports: the same networks to every target, and `verify` of each. What `torch.onnx` takes is printed
apart: both ONNX targets share it. TFLite up to 300 convolutions, beside what its own converter
takes for the float network.

targets: a ResNet-18 (3x32x32) to every target whose packages are installed, verification aside,
over one plain `torch.onnx.export(dynamo=True)` of the float model, in turns. What TFLite's own
converter takes for the float model stands beside it.

memory: the growth of a process while it exports a stack of large Linear layers, and while it
verifies the files, over the size of the float weights; needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.nets import resnet18
from lightning_qat import QuantizedModel, Recipe, convert, export, prepare, verify
from lightning_qat.export.protocol import Artifact
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges
from lightning_qat_exporters.qdq.build import OPSET
from lightning_qat_exporters.qdq.translate import translated

# Here, because the processes that measure memory import this module and run one function of it.
warnings.filterwarnings("ignore")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

TARGETS = ("fake_quant_onnx", "cann", *(("tflite",) if find_spec("litert_torch") else ()))
MOST_TFLITE_LAYERS = 300
"""Its converter would take minutes for more."""


class Block(nn.Module):
    """Two convolutions with batch norm and relu, and an addition; takes (batch, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        y = self.norm1(self.conv1(x)).relu()
        joined: Tensor = self.norm2(self.conv2(y)) + x
        return joined.relu()


def seconds(work: Callable[[], object]) -> float:
    """What the processor took for it."""
    start = time.process_time()
    work()
    return time.process_time() - start


def calibrate(net: nn.Module, x: Tensor) -> None:
    """One batch of ranges."""
    apply_phase(net, Phase("calibrate", True, False, True))
    with torch.no_grad():
        net.train()(x)
    commit_ranges(net)


def quantized(net: nn.Module, x: Tensor, recipe: str | Recipe = "int8") -> QuantizedModel:
    """The network prepared, calibrated and converted."""
    prepare(net, recipe, x)
    calibrate(net, x)
    return convert(net, x)


@contextlib.contextmanager
def capture_timed() -> Iterator[list[float]]:
    """What `torch.export` takes within the block, call by call."""
    real, times = torch.export.export, list[float]()

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        program = real(*args, **kwargs)
        times.append(time.process_time() - start)
        return program

    torch.export.export = timed
    try:
        yield times
    finally:
        torch.export.export = real


def layers(sizes: tuple[int, ...]) -> None:
    """Print `prepare`, `convert` and `torch.export` by the number of layers."""
    x = torch.randn(2, 4, 8, 8)
    quantized(nn.Sequential(Block()), x)  # what is loaded and compiled once
    print("layers  prepare  convert  torch.export   ms per layer without torch.export")
    for count in sizes:
        net = nn.Sequential(*(Block() for _ in range(count // 2)))
        preparing = seconds(lambda net=net: prepare(net, "int8", x))  # type: ignore[misc]
        calibrate(net, x)
        with capture_timed() as captures:
            converting = seconds(lambda net=net: convert(net, x))  # type: ignore[misc]
        own, capturing = preparing + converting - sum(captures), sum(captures)
        print(
            f"{count:6d}  {preparing:5.2f} s  {converting - capturing:5.2f} s  {capturing:10.2f} s"
            f"   {1e3 * own / count:.2f}"
        )


def float_onnx(net: nn.Module, x: Tensor, path: Path) -> None:
    """Torch's own export of the float model."""
    torch.onnx.export(net.eval(), (x,), path, dynamo=True, external_data=False, verbose=False)


def float_tflite(net: nn.Module, x: Tensor, path: Path) -> None:
    """litert-torch's own conversion of the float model."""
    litert: Any = importlib.import_module("litert_torch")
    from lightning_qat_exporters.quiet import quietly

    with quietly():
        litert.convert(net.eval(), (x,)).export(str(path))


def exports(sizes: tuple[int, ...]) -> None:
    """Print what targets and `verify` take per layer, by the number of layers."""
    # The first, small network loads what is loaded once.
    export_times(2)
    print("layers  milliseconds per layer")
    for count in sizes:
        times = export_times(count)
        told = (f"{name} {1e3 * taken / count:.1f}" for name, taken in times.items())
        print(f"{count:6d}  {', '.join(told)}", flush=True)


def export_times(count: int) -> dict[str, float]:
    """Seconds of every step with so many convolutions."""
    x = torch.randn(2, 4, 8, 8)
    net = nn.Sequential(*(Block() for _ in range(count // 2)))
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        with_tflite = "tflite" in TARGETS and count <= MOST_TFLITE_LAYERS
        times["torch.onnx, float"] = seconds(lambda: float_onnx(net, x, path))
        if with_tflite:
            times["litert-torch, float"] = seconds(lambda: float_tflite(net, x[:1], path))
        model = quantized(net, x)
        times["torch.onnx"] = seconds(lambda: translated(model, OPSET))
        for target in TARGETS if with_tflite else ("fake_quant_onnx", "cann"):
            artifacts: list[Artifact] = []
            writing = seconds(lambda t=target, a=artifacts: a.append(export(model, t, path)))  # type: ignore[misc]
            checking = seconds(lambda a=artifacts: verify(model, a[0]))  # type: ignore[misc]
            times |= {target: writing, f"verify {target}": checking}
    return times


def targets(width: int, rounds: int) -> None:
    """Print what each target takes, over torch's export of the float model."""
    x = torch.randn(2, 3, 32, 32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        small, net = resnet18(2), resnet18(width)
        times: dict[str, list[float]] = {}

        def measure(name: str, work: Callable[[], object], base: float = 1.0) -> float:
            taken = seconds(work) / base
            times.setdefault(name, []).append(taken)
            return taken

        # Every round has a model of its own: exporters share what they make of one.
        for turn in range(rounds + 1):
            if turn == 1:
                times.clear()  # the first, small round loads what is loaded once
            original = net if turn else small
            base = measure("float ONNX, s", lambda n=original: float_onnx(n, x, path))  # type: ignore[misc]
            model = quantized(_copy(original), x)
            total = sum(
                measure(name, lambda n=name, m=model: export(m, n, path), base)  # type: ignore[misc]
                for name in TARGETS
            )
            times.setdefault("all targets", []).append(total)
            onnx = sum(times[name][-1] for name in ("fake_quant_onnx", "cann"))
            times.setdefault("both ONNX targets", []).append(onnx)
            if "tflite" in TARGETS:
                work = lambda n=original: float_tflite(n, x[:1], path)  # noqa: E731
                measure("(litert-torch, float model)", work, base)
    print(f"ResNet-18, width {width}: times over one float torch.onnx.export, median of {rounds}")
    for name, found in times.items():
        print(f"  {name:28} {statistics.median(found):.2f}")


def _copy(net: nn.Module) -> nn.Module:
    twin = resnet18(net[0][0].out_channels)  # type: ignore[index]
    twin.load_state_dict(net.state_dict())
    return twin


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory now, or the most since `forget_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def forget_peak() -> None:
    """Let the peak start anew."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def grown(work: Callable[[], object]) -> int:
    """By how many bytes the process was larger at its largest than before."""
    gc.collect()
    forget_peak()
    before = resident()
    work()
    return resident(peak=True) - before


def stack(megabytes: int) -> nn.Module:
    """Linear layers of 16 MB each."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(max(megabytes // 16, 1))))


def memory_of(step: str, megabytes: int, queue: Any) -> None:
    """One process: over the bytes of the float weights, a step's growth, its files, `verify`'s."""
    torch.set_num_threads(1)
    x = torch.randn(2, 2048)
    recipe = Recipe(joins=False, outputs=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        small = quantized(stack(16), x, recipe)
        if step in TARGETS:
            verify(small, export(small, step, path))
        elif step == "float ONNX":
            float_onnx(stack(16), x, path)
        for file in Path(folder).iterdir():
            file.unlink()
        net, checking = stack(megabytes), 0
        size = sum(p.numel() * p.element_size() for p in net.parameters())
        if step == "float ONNX":
            most = grown(lambda: float_onnx(net, x, path))
        else:
            prepare(net, recipe, x)
            calibrate(net, x)
            if step == "convert":
                most = grown(lambda: convert(net, x))
            else:
                model = convert(net, x)
                del net
                artifacts: list[Artifact] = []
                most = grown(lambda: artifacts.append(export(model, step, path)))
                checking = grown(lambda: verify(model, artifacts[0]))
        files = sum(file.stat().st_size for file in Path(folder).iterdir())
    queue.put((most / size, files / size, checking / size))


def memory(megabytes: int) -> None:
    """Print the growth of every step, each in a process of its own."""
    print(f"{megabytes} MB of float weights; over their size: growth at the peak, files, verify")
    # Every large array is the system's own and goes back to it when freed, else what was freed
    # before would be used again and not be seen.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    context = multiprocessing.get_context("spawn")
    for step in ("float ONNX", "convert", *TARGETS):
        queue = context.SimpleQueue()
        process = context.Process(target=memory_of, args=(step, megabytes, queue))
        process.start()
        process.join()
        if process.exitcode:
            print(f"  {step:16} failed")
            continue
        print(f"  {step:16}", "  ".join(f"{figure:.2f}" for figure in queue.get()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("memory", "layers", "exports", "targets")
    parser.add_argument("--only", choices=parts, help="one part (default: all)")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[10, 100, 1000], help="default: 10 100 1000"
    )
    parser.add_argument("--width", type=int, default=64, help="of the ResNet (default: 64)")
    parser.add_argument("--rounds", type=int, default=3, help="exports of it (default: 3)")
    parser.add_argument("--megabytes", type=int, default=256, help="of weights (default: 256)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for part in parts:
        if options.only in (None, part):
            if part == "memory":
                memory(options.megabytes)
            elif part == "layers":
                layers(tuple(options.layers))
            elif part == "exports":
                exports(tuple(options.layers))
            else:
                targets(options.width, options.rounds)
