"""Cost of a quantized training step over the float step, beside other tools', in one run.

    python -m benchmarks.train_step             # ResNet-18 (32x32) and a MobileNetV2-style net
    python -m benchmarks.train_step --small     # narrow nets, under a minute

Forward, cross entropy, backward and SGD with momentum; float, ours and every installed tool of
``benchmarks/peers.py`` take turns, so that noise of the machine hits all alike. Printed: medians of
each step over the mean of the two float steps around it, and the process's memory is left out (one
process runs all).
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers import installed
from lightning_qat import prepare


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(cout))


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(cin, cout, 3, stride), conv(cout, cout, 3)
        self.shortcut = nn.Identity() if cin == cout and stride == 1 else conv(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class Inverted(nn.Module):
    """1x1, depthwise 3x3, 1x1; a shortcut where shapes allow it."""

    def __init__(self, cin: int, cout: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = cin * expand
        self.expand = conv(cin, hidden, 1)
        self.depthwise = conv(hidden, hidden, 3, stride, hidden)
        self.project = conv(hidden, cout, 1)
        self.same = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        """Block on ``(batch, cin, height, width)``."""
        y: Tensor = self.project(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return x + y if self.same else y


def resnet18(width: int) -> nn.Module:
    """ResNet-18 for 32x32 images."""
    layers: list[nn.Module] = [conv(3, width, 3), nn.ReLU()]
    cin = width
    for stage, cout in enumerate((width, 2 * width, 4 * width, 8 * width)):
        layers += [Residual(cin, cout, 2 if stage else 1), Residual(cout, cout, 1)]
        cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 10))


def mobilenet(width: int) -> nn.Module:
    """A MobileNetV2-style net for 32x32 images."""
    layers: list[nn.Module] = [conv(3, width, 3), nn.ReLU()]
    cin = width
    for cout, count, stride in ((width, 2, 1), (2 * width, 3, 2), (3 * width, 4, 2)):
        for index in range(count):
            layers.append(Inverted(cin, cout, stride if index == 0 else 1, 6))
            cin = cout
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(cin, 10))


def ours(net: nn.Module) -> nn.Module:
    """Our int8 recipe."""
    twin = copy.deepcopy(net)
    prepare(twin, "int8")
    return twin


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


def main(small: bool = False, rounds: int = 8, threads: int = 2) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    width = 16 if small else 64
    nets = {"ResNet-18": resnet18(width), "MobileNetV2-style": mobilenet(width // 4 * 2)}
    print(f"batch 32, 3x32x32, {threads} threads, median of {rounds} rounds")
    peers, absent = installed()
    print(f"not installed: {', '.join(absent) or 'none'}")
    for name, net in nets.items():
        steps = {"float": stepper(net, x, y), "lightning-qat int8": stepper(ours(net), x, y)}
        for title, peer in peers.items():
            steps[title] = stepper(peer.prepare(net, [x], 8, 8), x, y)
        variants = [title for title in steps if title != "float"]
        for step in steps.values():
            step()
            step()
        times: dict[str, list[float]] = {variant: [] for variant in steps}
        before = steps["float"]()
        for _ in range(rounds):
            for variant in variants:
                seconds, after = steps[variant](), steps["float"]()
                times[variant].append(seconds / ((before + after) / 2))
                times["float"].append(after)
                before = after
        print(f"{name}: float step {statistics.median(times['float']) * 1e3:.0f} ms")
        for variant in variants:
            print(f"  {variant:20} {statistics.median(times[variant]):.2f} of float")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Cost of a quantized training step over the float step."
    )
    parser.add_argument("--small", action="store_true", help="narrow nets, under a minute")
    parser.add_argument("--rounds", type=int, default=8, help="rounds per net (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    options = parser.parse_args()
    main(options.small, options.rounds, options.threads)
