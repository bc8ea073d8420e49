"""What quantizing every tensor costs and brings, on a ResNet-20.

    python benchmarks/joins.py

Training: one step (batch 32, 3x32x32) with joins found by interception, against the same network
with the same quantizers called by hand in its forward, and against float; they take turns.
Inference: ONNX Runtime on one thread, batch 1, the QDQ file against the float file, default session
options.
"""

from __future__ import annotations

import argparse
import collections
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import convert, export, prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.recipe.specs import ActivationSpec


def quantizer(wanted: bool) -> nn.Module:
    """A quantizer, or nothing."""
    return ActivationQuantizer(ActivationSpec()) if wanted else nn.Identity()


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; with ``by_hand`` it calls the quantizers itself."""

    def __init__(self, cin: int, cout: int, stride: int, by_hand: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)
        self.down = None if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)
        self.entry, self.left = quantizer(by_hand), quantizer(by_hand)
        self.right = quantizer(by_hand and self.down is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        x = self.entry(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x if self.down is None else self.down(x)
        return F.relu(self.left(y) + self.right(shortcut))


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images."""

    def __init__(self, by_hand: bool = False, width: int = 16) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        blocks, cin = [], width
        for stage, cout in enumerate((width, 2 * width, 4 * width)):
            for index in range(3):
                stride = 2 if stage and not index else 1
                blocks.append(Block(cin, cout, stride, by_hand))
                cin = cout
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(cin, 10)
        self.pooled, self.logits = quantizer(by_hand), quantizer(by_hand)

    def forward(self, x: Tensor) -> Tensor:
        """Logits for ``(batch, 3, 32, 32)``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        logits: Tensor = self.logits(self.head(self.pooled(x).mean((2, 3))))
        return logits


def stepper(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """One training step that returns its seconds."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        optimizer.step()
        return time.perf_counter() - start

    return step


def training(rounds: int) -> None:
    """Print what the interception costs."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    joins, by_hand, plain = ResNet20(), ResNet20(by_hand=True), ResNet20()
    prepare(joins, "int8", x)
    prepare(by_hand, Recipe(joins=False, outputs=False))
    for block in by_hand.modules():
        if isinstance(block, Block):
            # The block has quantized what these read.
            for layer in (block.conv1, block.down):
                if layer is not None:
                    layer.input_quantizer = nn.Identity()
    steps = {
        "float": stepper(plain, x, y),
        "quantizers called by hand": stepper(by_hand, x, y),
        "quantizers found by interception": stepper(joins, x, y),
    }
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(step())
    print(f"training step, median of {rounds} rounds, each over the float step of its round")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["float"], strict=True))
        print(f"  {name:34} {statistics.median(own) * 1e3:6.1f} ms  {ratio:.2f} of float")
    hand = times["quantizers called by hand"]
    cost = statistics.median(
        a / b for a, b in zip(times["quantizers found by interception"], hand, strict=True)
    )
    print(f"  interception over calls by hand: {cost:.3f}")


def inference(rounds: int) -> None:
    """Print what ONNX Runtime makes of the file."""
    torch.manual_seed(0)
    net, x = ResNet20(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 32, 32))
    folder = Path(tempfile.mkdtemp())
    net.eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(net, (x,), folder / "float.onnx", dynamo=True, verbose=False)
    prepare(net.train(), "int8", x)
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 32, 32))
    quantized = convert(net, x)
    files = {
        "float": folder / "float.onnx",
        "int8": export(quantized, "fake_quant_onnx", folder / "net").files["model"],
    }
    sessions = {}
    for name, path in files.items():
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.optimized_model_filepath = str(folder / f"{name}_optimized.onnx")
        sessions[name] = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    feeds = {s.get_inputs()[0].name: np.asarray(x) for s in sessions.values()}
    for _ in range(rounds):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: next(iter(feeds.values()))})
            times[name].append(time.perf_counter() - start)
    nodes = onnx.load(folder / "int8_optimized.onnx").graph.node
    print("inference in ONNX Runtime, one thread, batch 1")
    ratio = statistics.median(times["int8"]) / statistics.median(times["float"])
    print(f"  int8 over float: {ratio:.2f}")
    print(f"  nodes: {dict(collections.Counter(node.op_type for node in nodes))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What quantizing every tensor costs and brings.")
    parser.add_argument("--rounds", type=int, default=20, help="training rounds (default: 20)")
    options = parser.parse_args()
    torch.set_num_threads(2)
    training(options.rounds)
    inference(20 * options.rounds)
