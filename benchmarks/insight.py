"""What sensitivity costs and finds, and whether suggest finds the least; see docs/insight.md.

    python -m benchmarks.insight
    python -m benchmarks.insight --only cost

*Cost*: CPU seconds of `sensitivity` of a net of 50 layers over 512 samples, over those of 51
evaluations of the float model. *Fragile*: in a chain of 20 layers two at random get one far weight;
counted are the plantings in which these two rank first. *Digits*: a net of scikit-learn's digits at
4 bits; the layers that `suggest` raises for a budget, beside the fewest of all subsets.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_qat import Recipe, sensitivity, suggest

LAYERS, SAMPLES, PLANTINGS = 50, 512, 20


def deep_net(layers: int = LAYERS, width: int = 16) -> nn.Module:
    """Convolutions with batch norm and relu, and a classifier."""
    parts: list[nn.Module] = []
    for number in range(layers - 1):
        parts += [nn.Conv2d(3 if number == 0 else width, width, 3, padding=1)]
        parts += [nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def cost() -> None:
    """Seconds of all measurements over seconds of as many float evaluations as there are layers."""
    batches = torch.split(torch.randn(SAMPLES, 3, 16, 16), 64)
    model = deep_net()

    @torch.no_grad()
    def evaluate(measured: nn.Module) -> float:
        return sum(float(measured(x)[:, 0].sum()) for x in batches)

    plain = min(seconds(lambda: evaluate(model)) for _ in range(3))
    taken = seconds(lambda: sensitivity(model, "int8", evaluate, progress=False))
    ratio = taken / (plain * (LAYERS + 1))
    print(
        f"cost: {LAYERS} layers, {SAMPLES} samples: {taken:.1f} s, {ratio:.2f} x float", flush=True
    )


def fragile() -> None:
    """How often two planted layers are the two that cost most."""
    found = 0
    for seed in range(PLANTINGS):
        torch.manual_seed(seed)
        planted = random.Random(seed).sample(range(20), 2)
        parts: list[nn.Module] = []
        for number in range(20):
            layer = nn.Linear(16, 16, bias=False)
            with torch.no_grad():
                layer.weight.copy_(torch.eye(16) * 0.8 + torch.rand(16, 16) * 0.05)
                layer.weight[0] = 0.0
                if number in planted:
                    layer.weight[:, 0] = 40.0
            parts += [layer, nn.ReLU()]
        x = torch.rand(256, 16)
        x[:, 0] = 0.0
        result = sensitivity(nn.Sequential(*parts).eval(), "int8", data=[x], progress=False)
        found += {row.layer for row in result.ranking[:2]} == {str(2 * n) for n in planted}
    print(f"fragile: two planted layers found in {found} of {PLANTINGS}", flush=True)


def digits() -> None:
    """The layers raised on digits, and the fewest that brute force finds."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels)
    model = trained(x[:1200], y[:1200])
    test = x[1200:], y[1200:]

    @torch.no_grad()
    def accuracy(measured: nn.Module) -> float:
        return float((measured(test[0]).argmax(1) == test[1]).float().mean())

    four = Recipe.from_dict({"weight": {"bits": 4}, "activation": {"bits": 4}})
    result = sensitivity(model, four, accuracy, data=[x[:256]], progress=False)
    print(result, flush=True)
    candidates, layers = result.candidates, [size.layer for size in result.sizes]
    assert candidates is not None
    values = {
        chosen: candidates.measure(
            candidates.everything() | dict(zip(layers, chosen, strict=True)), str(chosen)
        )
        for chosen in itertools.product((4, 8), repeat=len(layers))
    }
    for budget in (0.005, 0.01, 0.02, 0.03):
        good = [c for c, value in values.items() if result.float_value - value <= budget + 1e-9]
        if not good:
            print(f"digits: budget {budget}: no subset of layers meets it", flush=True)
            continue
        least = min(chosen.count(8) for chosen in good)
        suggestion = suggest(result, budget)
        print(
            f"digits: budget {budget}: drop {result.float_value - suggestion.value:.4f}, "
            f"{len(suggestion.changes)} layers raised; brute force over {len(values)}: {least}",
            flush=True,
        )


def trained(x: Tensor, y: Tensor) -> nn.Module:
    """A small convolutional net, trained in float."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for rows in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[rows]), y[rows]))
            optimizer.step()
    return model.eval()


def seconds(call: Callable[[], object]) -> float:
    """CPU seconds of a call, which other programs disturb least."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


PARTS = {"fragile": fragile, "digits": digits, "cost": cost}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=[*PARTS], help="parts to run (default: all)"
    )
    torch.set_num_threads(1)
    for part in parser.parse_args().only:
        PARTS[part]()
