"""Accuracy of quantization-aware training on scikit-learn's digits, at several bit widths.

Every recipe starts from the same float checkpoint of each seed and trains 10 more epochs with the
same batches and learning rates. Given are the mean over seeds of the test accuracy with its
standard error, the mean difference to the float network trained as long, and the lowest. Rows of
*calibrated* were not trained; those of *corrected* neither, but for their biases. ``--peers``
measures other tools, as far as they are installed, on the same checkpoints (see
``benchmarks/peers.py``).

    python -m benchmarks.accuracy --seeds 5
    python -m benchmarks.accuracy --seeds 5 --peers
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich import print as show
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.peers import installed
from lightning_qat import ActivationSpec, Recipe, WeightSpec, prepare
from lightning_qat.quantizers.factory import quantizer_parameters
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.bias_correction import BiasCorrection
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges

BATCH = 64


def learned(weight: int, activation: int, first_last: int | None = None) -> Recipe:
    """Learned scales for weights and activations, from the least squared error."""
    return Recipe(
        first_last=first_last,
        weight=WeightSpec(bits=weight, quantizer="learned"),
        activation=ActivationSpec(bits=activation, quantizer="learned", calibration="mse"),
        joins=False,
        outputs=False,
    )


def observed(weight: int, activation: int) -> Recipe:
    """Scales that follow the data and the weights."""
    return Recipe(
        weight=WeightSpec(bits=weight),
        activation=ActivationSpec(bits=activation),
        joins=False,
        outputs=False,
    )


RECIPES = {
    "W8A8 int8": observed(8, 8),
    "W8A8 learned": learned(8, 8),
    "W4A4 observed": observed(4, 4),
    "W4A4 learned": learned(4, 4),
    "W4A4 learned, first and last 8": learned(4, 4, 8),
    "W2A4 learned": learned(2, 4),
    "W2A4 learned, first and last 8": learned(2, 4, 8),
}
PEER_BITS = ((8, 8), (4, 4), (2, 4))
EPOCHS, RATE = 10, 1e-3
FLOAT = f"float, {EPOCHS} more epochs"


def block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    """Convolution, batch norm, relu."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def network(width: int = 16) -> nn.Module:
    """Depthwise-separable, 8x8 pictures to 10 classes."""
    w = width
    return nn.Sequential(
        block(1, w, 3),
        *(block(w, w, 3, groups=w), block(w, 2 * w, 1)),
        *(block(2 * w, 2 * w, 3, 2, groups=2 * w), block(2 * w, 4 * w, 1)),
        *(block(4 * w, 4 * w, 3, 2, groups=4 * w), block(4 * w, 4 * w, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * w, 10)),
    )


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Half of the pictures to train, half to test, per class."""
    pictures, labels = load_digits(return_X_y=True)
    halves = train_test_split(pictures, labels, test_size=0.5, stratify=labels, random_state=seed)
    x, x_test = (torch.tensor(h, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16 for h in halves[:2])
    y, y_test = (torch.tensor(h) for h in halves[2:])
    return x, y, x_test, y_test


def batches(x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, without the incomplete batch at its end."""
    order = torch.randperm(len(x), generator=generator)
    for start in range(0, len(x) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield x[chosen], y[chosen]


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    rate: float,
    seed: int,
    freeze: Callable[[nn.Module], None] = lambda model: None,
    scale_rate: float = 1.0,
) -> None:
    """Adam with a cosine schedule per step; ``freeze`` is called when 60 % is done.

    Learned scales of weights have ``scale_rate`` times the learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = quantizer_parameters(model, "weights")
    others = [p for p in model.parameters() if all(p is not q for q in scales)]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": scales, "lr": rate * scale_rate}]
    optimizer = torch.optim.Adam(groups, lr=rate)
    steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        if epoch == 6 * epochs // 10:
            freeze(model)
        for pictures, labels in batches(x, y, generator):
            model.train()
            optimizer.zero_grad()
            loss: Tensor = F.cross_entropy(model(pictures), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            commit_ranges(model)


def calibration(x: Tensor, seed: int) -> list[Tensor]:
    """The batches that all calibrate with."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [x[order[start : start + BATCH]] for start in range(0, 8 * BATCH, BATCH)]


def calibrate(model: nn.Module, x: Tensor, seed: int) -> None:
    """Ranges from 8 batches, batch norm as it is; from here on the model quantizes."""
    apply_phase(model, Phase("calibrate", True, False, True))
    model.train()
    with torch.no_grad():
        for batch in calibration(x, seed):
            model(batch)
            commit_ranges(model)


def correct(model: nn.Module, x: Tensor, seed: int) -> None:
    """Biases and batch norms take the shift of quantization back, on the same batches."""
    model.eval()
    with (correction := BiasCorrection(model)):
        for batch in calibration(x, seed):
            correction.run(lambda batch=batch: model(batch))  # type: ignore[misc]
    correction.apply()


def with_error(values: list[float], sign: str = "") -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.2f} ± {error:.2f}"


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return 100.0 * float((model.eval()(x).argmax(1) == y).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many checkpoints (default: 5)")
    parser.add_argument("--only", default="", help="recipes whose name holds this")
    parser.add_argument(
        "--scale-rate",
        type=float,
        default=1.0,
        help="learning rate of the learned scales of weights over that of the weights (default: 1)",
    )
    parser.add_argument("--peers", action="store_true", help="other tools as well")
    options = parser.parse_args()
    peers, absent = installed() if options.peers else ({}, [])
    if absent:
        show(f"not installed: {', '.join(absent)}")
    recipes = {name: recipe for name, recipe in RECIPES.items() if options.only in name}
    found: dict[str, list[float]] = {}
    for seed in track(range(options.seeds), "seeds"):
        torch.manual_seed(seed)
        x, y, x_test, y_test = data(seed)
        checkpoint = network()
        train(checkpoint, x, y, 40, 3e-3, seed)
        found.setdefault("float", []).append(accuracy(checkpoint, x_test, y_test))
        longer = copy.deepcopy(checkpoint)
        train(longer, x, y, EPOCHS, RATE, seed)
        found.setdefault(FLOAT, []).append(accuracy(longer, x_test, y_test))
        for name, recipe in recipes.items():
            model = copy.deepcopy(checkpoint)
            prepare(model, recipe, x[:2])
            calibrate(model, x, seed)
            apply_phase(model, Phase("quantize", "learned" not in name, True, False))
            found.setdefault(f"{name}, calibrated", []).append(accuracy(model, x_test, y_test))
            trial = copy.deepcopy(model)
            correct(trial, x, seed)
            found.setdefault(f"{name}, corrected", []).append(accuracy(trial, x_test, y_test))
            train(model, x, y, EPOCHS, RATE, seed, scale_rate=options.scale_rate)
            found.setdefault(name, []).append(accuracy(model, x_test, y_test))
        for title, peer in peers.items():
            for weight, activation in PEER_BITS:
                name = f"W{weight}A{activation} {title}"
                if options.only not in name:
                    continue
                model = peer.prepare(checkpoint, calibration(x, seed), weight, activation)
                trial = copy.deepcopy(model)
                peer.freeze(trial)
                found.setdefault(f"{name}, calibrated", []).append(accuracy(trial, x_test, y_test))
                train(model, x, y, EPOCHS, RATE, seed, peer.freeze)
                found.setdefault(name, []).append(accuracy(model, x_test, y_test))
    table = Table("recipe", "accuracy %", "to float", "lowest")
    for name, values in sorted(found.items(), key=lambda row: not row[0].startswith("float")):
        unfusable = [mine - float_ for mine, float_ in zip(values, found[FLOAT], strict=True)]
        table.add_row(name, with_error(values), with_error(unfusable, "+"), f"{min(values):.2f}")
    show(table)


if __name__ == "__main__":
    main()
