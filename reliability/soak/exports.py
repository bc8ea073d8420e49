"""Convert and export again and again: what every round leaves behind, and whose it is."""

from __future__ import annotations

import json
import linecache
import logging
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from lightning_qat import convert, prepare
from lightning_qat.export.export import export
from reliability.soak.memory import objects, resident
from reliability.soak.trend import trend

KINDS = ("torch.export alone", "convert", "fake_quant_onnx", "cann", "tflite")

WARM = 5
"""Rounds before objects are counted: imports, and caches that fill once."""

OWN = ("lightning_qat", "onnx", "onnxscript", "onnxruntime", "google", "litert", "ai_edge")
"""Objects of these packages may not stay. Those of torch's tracer do (``torch.export alone``)."""


class Net(nn.Module):
    """Convolutions with batch norms, a sum of two branches, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, 3) of images (batch, 3, 8, 8)."""
        stem = self.stem(x)
        logits: Tensor = self.head(F.relu(self.branch(stem) + stem).mean((2, 3)))
        return logits


@dataclass
class Left:
    """What rounds left behind.

    Args:
        kind: Of ``KINDS``.
        rounds: So many.
        seconds: Of a round.
        bytes_per_round: Slope of resident memory.
        objects: Of each type, that stayed per round after the first ones; those of at least one in
            two rounds.
        process: Modules, loggers, threads, open files, lines of source, per round.
    """

    kind: str
    rounds: int
    seconds: float
    bytes_per_round: float
    objects: dict[str, float]
    process: dict[str, float]

    @property
    def own(self) -> dict[str, float]:
        """Objects that are not torch's or Python's own."""
        return {name: n for name, n in self.objects.items() if name.startswith(OWN)}


def left_by(kind: str, rounds: int, minutes: float = 60) -> Left:
    """Run rounds of a kind in this process, and count.

    Args:
        kind: Of ``KINDS``.
        rounds: At most; at least 20 are run.
        minutes: No further round begins afterwards.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        once = _round(kind, Path(folder))
        memory, begin = list[int](), time.monotonic()
        before, was = Counter[str](), Counter[str]()
        while len(memory) < rounds:
            once()
            if len(memory) == WARM:
                before, was = objects(), _process()
            memory.append(resident())
            if len(memory) >= 20 and time.monotonic() - begin > 60 * minutes:
                break
        seconds = (time.monotonic() - begin) / len(memory)
        counted = len(memory) - WARM - 1
        stayed = {name: n / counted for name, n in (objects() - before).items()}
        process = {name: n / counted for name, n in (_process() - was).items()}
    settled = memory[len(memory) // 4 :]
    slope = trend(settled).change / len(settled)
    kept = {name: n for name, n in stayed.items() if n >= 0.5}
    return Left(kind, len(memory), seconds, slope, kept, process)


def _round(kind: str, folder: Path) -> Callable[[], object]:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    net = Net()
    if kind == "torch.export alone":
        net.eval()
        sizes = ({0: Dim.AUTO},)
        return lambda: torch.export.export(net, (x,), dynamic_shapes=sizes, strict=False)
    prepare(net, "int8", example_inputs=(x,))
    net.train()(x)
    net.eval()
    if kind == "convert":
        return lambda: convert(net, (x,))
    return lambda: export(convert(net, (x,)), kind, folder / "net")


def _process() -> Counter[str]:
    """What a process collects beside objects."""
    files = Path("/proc/self/fd")
    return Counter(
        {
            "modules": len(sys.modules),
            "loggers": len(logging.root.manager.loggerDict),
            "handlers": len(logging.root.handlers),
            "warning filters": len(warnings.filters),
            "threads": threading.active_count(),
            "open files": len(list(files.iterdir())) if files.is_dir() else 0,
            "sources in linecache": len(linecache.cache),
        }
    )


def report_exports(rounds: int, minutes: float) -> bool:
    """Every kind in a process of its own, a row each; whether none of our objects stays."""
    print("| kind | rounds | s a round | KB a round | our objects | else |")
    print("|---|---|---|---|---|---|", flush=True)
    right = True
    for kind in KINDS:
        command = [
            sys.executable,
            "-m",
            "reliability.soak.exports",
            kind,
            str(rounds),
            str(minutes),
        ]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        left = Left(**json.loads(done.stdout.splitlines()[-1]))
        own = ", ".join(f"{n:.1f} {name}" for name, n in left.own.items()) or "none"
        other = ", ".join(f"{n:.1f} {name}" for name, n in left.process.items()) or "none"
        print(
            f"| {kind} | {left.rounds} | {left.seconds:.1f} | {left.bytes_per_round / 1024:.0f} | "
            f"{own} | {other} |",
            flush=True,
        )
        largest = sorted(left.objects.items(), key=lambda pair: -pair[1])[:8]
        print("  " + ", ".join(f"{n:.0f} {name}" for name, n in largest), file=sys.stderr)
        right &= not left.own
    return right


if __name__ == "__main__":
    print(json.dumps(asdict(left_by(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))))
