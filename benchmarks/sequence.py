"""LSTM, GRU and others on a noisy adding problem; and what a recurrent layer's step costs.

    python -m benchmarks.sequence                  # 5 seeds, some minutes
    python -m benchmarks.sequence --small          # 1 seed, about a minute
    python -m benchmarks.sequence --from-nothing   # random weights, every calibration, 3 seeds
    python -m benchmarks.sequence --from-nothing --networks GRU attention --rows moving_average

The adding problem (Hochreiter and Schmidhuber, 1997): a sequence of random numbers in [0, 1], two
of them marked; the target is their sum, here measured with a noise of standard deviation 0.1. A
network that remembers nothing ends at a squared error of 0.177, none gets below 0.01. (Without
noise the float error goes to zero, and a ratio to it says nothing.) A float network is trained;
then it and its quantized copies are trained on, on the same batches. Errors are those of fresh
sequences. With ``--from-nothing`` networks of other layers take part, and the quantized ones start
from the random weights of the float one, and quantize from the second batch on;
``benchmarks.from_nothing`` and ``benchmarks.ranges`` say what the rows are.

A training step is compared with a float loop over cells written out by hand, which is what any
quantization inside of a layer needs, and with torch's own layer, one kernel for all steps that
nothing can be quantized in. They take turns, so that noise of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.accuracy.runs import AGAIN, FLOAT
from benchmarks.from_nothing import recipes
from benchmarks.ranges import OTHERS, following
from lightning_qat import Recipe, prepare
from lightning_qat.layers import GRUQAT, LSTMQAT

STEPS, HIDDEN, BATCH = 20, 32, 64
NOISE = 0.1

Kind = type[nn.LSTM] | type[nn.GRU]


class Adder(nn.Module):
    """A recurrent layer and a linear one on its last output; takes (batch, time, 2)."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.rnn: Any = kind(2, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, ``(batch,)``."""
        output, _ = self.rnn(x)
        result: Tensor = self.head(output[:, -1])[:, 0]
        return result


class Attention(nn.Module):
    """Two layers of a transformer's encoder, with learned positions, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(2, HIDDEN)
        self.positions = nn.Parameter(0.1 * torch.randn(1, STEPS, HIDDEN))
        layer = nn.TransformerEncoderLayer(
            HIDDEN, 4, 2 * HIDDEN, 0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, ``(batch,)``."""
        result: Tensor = self.head(self.encoder(self.read(x) + self.positions).mean(1))[:, 0]
        return result


class Layers(nn.Sequential):
    """Layers one after the other, on (batch, 2, time)."""

    def forward(self, input: Tensor) -> Tensor:
        """The sum, ``(batch,)``."""
        result: Tensor = super().forward(input.transpose(1, 2))[:, 0]  # type: ignore[no-untyped-call]
        return result


def convolutions() -> nn.Module:
    """Three of them, each with a relu."""
    return Layers(
        *(nn.Conv1d(2, 32, 5, 2, 2), nn.ReLU(), nn.Conv1d(32, 32, 5, 2, 2), nn.ReLU()),
        *(nn.Conv1d(32, 32, 5), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1)),
    )


def linear_layers() -> nn.Module:
    """Three of them, with gelu in between."""
    return Layers(
        *(nn.Flatten(), nn.Linear(2 * STEPS, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU()),
        nn.Linear(64, 1),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Adder(nn.LSTM),
    "GRU": lambda: Adder(nn.GRU),
    "attention": Attention,
    "convolutions": convolutions,
    "linear layers": linear_layers,
}
ROWS = tuple(row for row in (*recipes(), *OTHERS) if row != AGAIN)


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs ``(count, STEPS, 2)`` and noisy sums ``(count,)``; one mark in each half."""
    values = torch.rand(count, STEPS, generator=generator)
    half = STEPS // 2
    marks = torch.zeros(count, STEPS)
    for start in (0, half):
        places = torch.randint(start, start + half, (count, 1), generator=generator)
        marks.scatter_(1, places, 1.0)
    sums = (values * marks).sum(1)
    return torch.stack((values, marks), -1), sums + NOISE * torch.randn(count, generator=generator)


def train(net: nn.Module, seed: int, updates: int, rate: float) -> float:
    """Adam in one cycle of the learning rate; returns the error on fresh sequences."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, updates)
    net.train()
    for _ in range(updates):
        x, y = sequences(BATCH, generator)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(net(x), y))
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    x, y = sequences(8192, torch.Generator().manual_seed(1_000_000 + seed))
    with torch.no_grad():
        return F.mse_loss(net.eval()(x), y).item()


def errors(kind: Kind, seeds: int, updates: int) -> None:
    """Print the errors of every variant and seed."""
    results: dict[str, list[float]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = Adder(kind)
        train(start, seed, updates, 1e-2)
        for name, recipe in (("float", None), ("W8A8", "int8"), ("W4A8", "w4a8")):
            net = copy.deepcopy(start)
            if recipe is not None:
                prepare(net, recipe, sequences(2, torch.Generator())[0])
            results.setdefault(name, []).append(train(net, 1000 + seed, updates, 1e-3))
    reference = statistics.mean(results["float"])
    print(f"{kind.__name__}: squared error after {updates} + {updates} updates")
    for name, found in results.items():
        mean = statistics.mean(found)
        each = " ".join(f"{value:.5f}" for value in found)
        print(f"  {name:6} {mean:.5f}  {mean / reference - 1:+.1%} of float  ({each})")


def errors_from_nothing(network: str, rows: Sequence[str], seeds: int, updates: int) -> None:
    """Print the errors of 8 bits without a trained start, for ways that a range follows."""
    print(f"{network} from nothing: squared error after {updates} updates")
    reference: list[float] = []
    for row in rows:
        found = [error_from_nothing(network, row, seed, updates) for seed in range(seeds)]
        reference = reference or found
        ratio = statistics.mean(found) / statistics.mean(reference)
        each = " ".join(f"{value:.5f}" for value in found)
        print(f"  {row:17} {ratio - 1:+.1%} of float  ({each})", flush=True)


def error_from_nothing(network: str, row: str, seed: int, updates: int) -> float:
    """Train a network from the random weights of a seed."""
    torch.manual_seed(seed)
    net = NETWORKS[network]()
    with following(row):
        recipe = recipes().get(row, Recipe())
        if recipe is not None:
            prepare(net, recipe, sequences(2, torch.Generator())[0])
        return train(net, seed, updates, 1e-2)


def parameters(rnn: Any, name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer's input (``ih``) or hidden state (``hh``)."""
    return getattr(rnn, f"weight_{name}_l0"), getattr(rnn, f"bias_{name}_l0")


class HandLSTM(nn.LSTM):
    """A float loop over cells; batch first, one layer."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """Hidden states of all steps, and none of the rest."""
        h = c = x.new_zeros(len(x), self.hidden_size)
        ih, hh = parameters(self, "ih"), parameters(self, "hh")
        outputs = []
        for step in x.unbind(1):
            gates = F.linear(step, *ih)
            gates = gates + F.linear(h, *hh)
            i, f, g, o = gates.chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


class HandGRU(nn.GRU):
    """A float loop over cells; batch first, one layer."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        """Hidden states of all steps, and none of the rest."""
        h = x.new_zeros(len(x), self.hidden_size)
        ih, hh = parameters(self, "ih"), parameters(self, "hh")
        outputs = []
        for step in x.unbind(1):
            r, z, n = F.linear(step, *ih).chunk(3, 1)
            s, y, m = F.linear(h, *hh).chunk(3, 1)
            new = (n + (r + s).sigmoid() * m).tanh()
            h = new + (z + y).sigmoid() * (h - new)
            outputs.append(h)
        return torch.stack(outputs, 1), None


def stepper(net: nn.Module, x: Tensor) -> Callable[[], float]:
    """One training step that returns its seconds."""
    optimizer = torch.optim.SGD(net.parameters(), 1e-3)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(net(x)[0].square().mean())
        optimizer.step()
        return time.perf_counter() - start

    return step


def costs(rounds: int) -> None:
    """Print what a step costs in layers of three sizes."""
    kinds: tuple[tuple[str, Any, Any, Any], ...] = (
        ("LSTM", HandLSTM, LSTMQAT, nn.LSTM),
        ("GRU", HandGRU, GRUQAT, nn.GRU),
    )
    for batch, length, features, width in ((32, 20, 16, 32), (32, 50, 64, 128), (64, 50, 128, 256)):
        x = torch.randn(batch, length, features)
        for name, *variants in kinds:
            steps = [stepper(kind(features, width, batch_first=True), x) for kind in variants]
            times: list[list[float]] = [[] for _ in steps]
            for _ in range(rounds + 2):
                for step, seconds in zip(steps, times, strict=True):
                    seconds.append(step())
            hand, ours, fused = (statistics.median(seconds[2:]) * 1e3 for seconds in times)
            pairs = zip(times[1][2:], times[0][2:], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            print(
                f"{name} {features} -> {width}, batch {batch}, {length} steps: loop over cells "
                f"{hand:.1f} ms, quantized {ours:.1f} ms ({ratio:.2f}), torch's {fused:.1f} ms"
            )


def main(seeds: int, updates: int, rounds: int) -> None:
    """Print everything."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    costs(rounds)
    for kind in (nn.LSTM, nn.GRU):
        errors(kind, seeds, updates)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Quantized recurrent layers: errors on the adding problem, cost of a step."
    )
    parser.add_argument("--small", action="store_true", help="one seed, about a minute")
    parser.add_argument("--from-nothing", action="store_true", help="from random weights")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS),
                        help="to train from nothing; default: all")  # fmt: skip
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS, metavar="ROW",
                        help=f"of {', '.join(ROWS)}; default: all")  # fmt: skip
    options = parser.parse_args()
    if options.from_nothing:
        torch.set_num_threads(1)
        rows = [row for row in ROWS if row == FLOAT or row in options.rows]
        for network in options.networks:
            errors_from_nothing(network, rows, 1 if options.small else 3, 800)
    else:
        main(1 if options.small else 5, 1000, 15)
