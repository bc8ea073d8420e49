"""Does cross-layer equalisation help calibrated networks?

    python -m benchmarks.equalization                   # 10 seeds, three minutes

Nagel et al. (arXiv:1906.04721, 4.1): behind a relu a channel may be divided by any positive number
that the next layer multiplies back. Theirs makes the largest weight of both layers alike. Every
line calibrates the same float checkpoint of digits (a depthwise-separable network) with and without
it, biases corrected, nothing trained; differences are paired.
"""

from __future__ import annotations

import argparse
import copy
from itertools import pairwise
from typing import Any, Literal

import torch
from rich import print as show
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.accuracy.digits import DIGITS
from benchmarks.accuracy.protocol import calibrate, correct, trained_in_float, with_error
from benchmarks.accuracy.task import Data, score
from lightning_qat import ActivationSpec, Recipe, WeightSpec, prepare

ROUNDS = 20
"""Of equalisation over all pairs; a depthwise layer is in two of them."""
GRANULARITIES: tuple[Literal["per_channel", "per_tensor"], ...] = ("per_channel", "per_tensor")
POINTS = ((8, 8), (6, 8), (4, 8), (4, 4))


def equalized(model: nn.Sequential) -> nn.Sequential:
    """A copy that computes the same, with equalised convolutions."""
    model = copy.deepcopy(model).eval()
    blocks: list[Any] = [m for m in model if isinstance(m, nn.Sequential)]
    last = model[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for _ in range(ROUNDS):
            for (conv, norm, _relu), (after, *_) in pairwise(blocks):
                _equalize(conv, norm, after)
            _equalize(blocks[-1][0], blocks[-1][1], last)
    return model


def _equalize(conv: nn.Conv2d, norm: nn.BatchNorm2d, after: nn.Conv2d | nn.Linear) -> None:
    """Divide the channels between two layers; the factor goes into batch norm."""
    assert norm.running_var is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    before = conv.weight.flatten(1).abs().amax(1) * factor.abs()
    depthwise = after.weight.shape[1] == 1
    behind = _largest(after.weight, 0 if depthwise else 1)
    # Channels that are zero on one side have nothing to equalise.
    alive = (before > 1e-6) & (behind > 1e-6)
    divisor = torch.where(alive, (before / behind).sqrt(), torch.ones_like(before))
    norm.weight.div_(divisor)
    norm.bias.div_(divisor)
    shape = [1] * after.weight.dim()
    shape[0 if depthwise else 1] = -1
    after.weight.mul_(divisor.reshape(shape))


def _largest(weight: Tensor, axis: int) -> Tensor:
    return weight.abs().transpose(0, axis).flatten(1).amax(1)


def calibrated(
    checkpoint: nn.Module,
    data: Data,
    seed: int,
    bits: tuple[int, int],
    granularity: Literal["per_channel", "per_tensor"],
) -> float:
    """The score of a network that was calibrated, biases corrected."""
    model = copy.deepcopy(checkpoint)
    recipe = Recipe(
        weight=WeightSpec(bits=bits[0], granularity=granularity),
        activation=ActivationSpec(bits=bits[1], calibration="mse"),
    )
    prepare(model, recipe, data.x[:2])
    calibrate(model, data.x, seed)
    correct(model, data.x, seed)
    return score(DIGITS, model, data)


def main() -> None:
    """Run all seeds, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=10, help="checkpoints (default: 10)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in track(range(options.seeds), "seeds"):
        data = DIGITS.data(seed)
        checkpoint = trained_in_float(DIGITS, data, seed)
        assert isinstance(checkpoint, nn.Sequential)
        other = equalized(checkpoint)
        torch.testing.assert_close(
            checkpoint.eval()(data.x[:64]), other(data.x[:64]), rtol=1e-3, atol=1e-3
        )
        for bits in POINTS:
            for granularity in GRANULARITIES:
                scores = [calibrated(m, data, seed, bits, granularity) for m in (checkpoint, other)]
                name = f"W{bits[0]}A{bits[1]}"
                found.setdefault((name, granularity), []).append((scores[0], scores[1]))
    table = Table("bits", "weights", "as it is, %", "equalised, %", "difference")
    for (name, weights), pairs in found.items():
        columns = [[pair[i] for pair in pairs] for i in (0, 1)]
        difference = [after - before for before, after in pairs]
        table.add_row(name, weights, *map(with_error, columns), with_error(difference, "+"))
    show(table)


if __name__ == "__main__":
    main()
