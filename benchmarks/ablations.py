"""What moves the accuracy of 4 and 2 bits: one change at a time, on the same checkpoints.

    python -m benchmarks.ablations                      # 20 seeds
    python -m benchmarks.ablations --seeds 3 --only W4A4

Task, network and protocol are those of ``benchmarks.accuracy``: digits, a depthwise-separable
network, 10 epochs of Adam from each seed's float checkpoint, float and quantized networks at the
best of three learning rates there; *twice the rate* is the fourth. Every line is learned scales for
all layers with one change, and gives the mean over seeds with its standard error, and the mean of
the differences to the float network trained as long and to the unchanged recipe, each seed with its
own (paired).
*LSQ by hand* shares no code with the package: straight-through rounding written here, scales from
the least squared error, batch norm unfolded.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from rich import print as show
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.accuracy.digits import DIGITS
from benchmarks.accuracy.protocol import (
    batches,
    calibrate,
    calibration,
    train,
    trained_in_float,
    with_error,
)
from benchmarks.accuracy.task import BATCH, Data, score
from benchmarks.accuracy.tools import learned
from lightning_qat import Recipe, prepare
from lightning_qat.layers import QATLayer
from lightning_qat.quantizers.factory import quantizer_parameters
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges

EPOCHS = DIGITS.epochs
RATE, FLOAT_RATE = 4 * DIGITS.rate, 2 * DIGITS.rate
"""The best for both of 1, 2 and 4 times the task's rate, in ``benchmarks.accuracy``."""


@dataclass(frozen=True)
class Setting:
    """How one network is trained.

    Args:
        recipe: The recipe.
        rate: The learning rate.
        scale_rate: Of all learned numbers of quantizers, over ``rate``.
        temperature: The loss is the divergence from the float network's answers, softened by it;
            ``None``: it is the cross-entropy with the labels.
        float_epochs: So many of the epochs train in float.
        average_from: Weights are averaged over the steps from this share of the run on.
        batchnorm_again: The statistics of batch norm are estimated anew after training.
        batchnorm_frozen: Share of the run after which batch norm uses its statistics.
        dampening: Weights are drawn to their rounded values, by so much at the end of the run.
    """

    recipe: Recipe
    rate: float = RATE
    scale_rate: float = 1.0
    temperature: float | None = None
    float_epochs: int = 0
    average_from: float | None = None
    batchnorm_again: bool = False
    batchnorm_frozen: float | None = None
    dampening: float = 0.0


def with_activation(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with another specification of activations."""
    return replace(recipe, activation=replace(recipe.activation, **changes))


def with_weight(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with another specification of weights."""
    return replace(recipe, weight=replace(recipe.weight, **changes))


def changed(weight: int, activation: int) -> dict[str, Setting]:
    """The recipe, and its changes by name."""
    ours = learned(weight, activation)
    base = Setting(ours)
    return {
        "as it is": base,
        "weights of 8 bits": Setting(with_weight(ours, bits=8)),
        "activations of 8 bits": Setting(with_activation(ours, bits=8)),
        "first and last layer of 8 bits": Setting(replace(ours, first_last=8)),
        "weights by their maximum": Setting(with_weight(ours, quantizer="minmax")),
        "activations observed (mse)": Setting(with_activation(ours, quantizer="observed")),
        "activations from their minmax": Setting(with_activation(ours, calibration="minmax")),
        "activations symmetric": Setting(with_activation(ours, symmetric=True)),
        "scales at a tenth of the rate": replace(base, scale_rate=0.1),
        "scales at a third of the rate": replace(base, scale_rate=0.3),
        "scales at three times the rate": replace(base, scale_rate=3.0),
        "a quarter of the rate": replace(base, rate=RATE / 4),
        "half of the rate": replace(base, rate=RATE / 2),
        "twice the rate": replace(base, rate=2 * RATE),
        "float teacher": replace(base, temperature=1.0),
        "float teacher, temperature 4": replace(base, temperature=4.0),
        "half of the epochs in float": replace(base, float_epochs=EPOCHS // 2),
        "weights averaged over the last quarter": replace(base, average_from=0.75),
        "batch norm estimated again": replace(base, batchnorm_again=True),
        "batch norm frozen at 60 %": replace(base, batchnorm_frozen=0.6),
        "oscillation dampened by 0.001": replace(base, dampening=0.001),
        "oscillation dampened by 0.01": replace(base, dampening=0.01),
        "oscillation dampened by 0.1": replace(base, dampening=0.1),
    }


def run(setting: Setting, checkpoint: nn.Module, pictures: Data, seed: int) -> float:
    """Train one network; its accuracy on the test pictures."""
    x, y = pictures.x, pictures.y
    model = copy.deepcopy(checkpoint)
    prepare(model, setting.recipe, x[:2])
    calibrate(model, x, seed)
    fit(setting, model, copy.deepcopy(checkpoint).eval(), x, y, seed)
    if setting.batchnorm_again:
        estimate_batchnorms(model, x)
    return score(DIGITS, model, pictures)


def fit(
    setting: Setting, model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, seed: int
) -> None:
    """The training of ``benchmarks.accuracy.protocol``, with what a setting changes."""
    generator = torch.Generator().manual_seed(seed)
    own = [*quantizer_parameters(model)]
    others = [p for p in model.parameters() if all(p is not q for q in own)]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": own, "lr": setting.rate * setting.scale_rate},
    ]
    optimizer = torch.optim.Adam(groups, lr=setting.rate)
    per_epoch = len(x) // BATCH
    steps = EPOCHS * per_epoch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    observed = setting.recipe.activation.quantizer == "observed"
    sums, count, step = [torch.zeros_like(p) for p in model.parameters()], 0, 0
    for epoch in range(EPOCHS):
        quantizing = epoch >= setting.float_epochs
        frozen = setting.batchnorm_frozen is not None and epoch >= setting.batchnorm_frozen * EPOCHS
        apply_phase(model, Phase("quantize", observed and quantizing, quantizing, frozen))
        for pictures, labels in batches(x, y, generator):
            model.train()
            optimizer.zero_grad()
            loss = loss_of(setting, model(pictures), teacher, pictures, labels)
            if setting.dampening:
                factor = setting.dampening * (1 - math.cos(math.pi * step / steps)) / 2
                loss = loss + factor * roughness(model)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            commit_ranges(model)
            step += 1
            if setting.average_from is not None and step >= setting.average_from * steps:
                count += 1
                for total, parameter in zip(sums, model.parameters(), strict=True):
                    total += parameter.detach()
    if count:
        with torch.no_grad():
            for total, parameter in zip(sums, model.parameters(), strict=True):
                parameter.copy_(total / count)
        estimate_batchnorms(model, x)


def roughness(model: nn.Module) -> Tensor:
    """Squared distances of weights to their rounded values (Nagel et al., arXiv:2203.11086, 4.1).

    What is clipped is drawn nowhere.
    """
    parts = []
    for layer in model.modules():
        if isinstance(layer, QATLayer):
            rounded = layer.weight_quantizer(layer.weight.detach()).detach()
            ends = [rounded.flatten(1).amin(1), rounded.flatten(1).amax(1)]
            shape = (-1, *[1] * (rounded.dim() - 1))
            inside = layer.weight.clamp(*(end.reshape(shape) for end in ends))
            parts.append((rounded - inside).square().sum())
    return torch.stack(parts).sum()


def loss_of(
    setting: Setting, logits: Tensor, teacher: nn.Module, pictures: Tensor, labels: Tensor
) -> Tensor:
    """Cross-entropy, or the divergence from the teacher (Hinton et al., arXiv:1503.02531)."""
    if setting.temperature is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        wanted = F.softmax(teacher(pictures) / setting.temperature, 1)
    found = F.log_softmax(logits / setting.temperature, 1)
    return F.kl_div(found, wanted, reduction="batchmean") * setting.temperature**2


@torch.no_grad()
def estimate_batchnorms(model: nn.Module, x: Tensor) -> None:
    """Means and variances of all batches, alike, of the trained weights."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    apply_phase(model, Phase("quantize", False, True, False))
    model.train()
    for start in range(0, len(x) - BATCH + 1, BATCH):
        model(x[start : start + BATCH])


class HandQuantizer(nn.Module):
    """LSQ (Esser et al., arXiv:1902.08153), for one tensor or each channel of a weight."""

    def __init__(self, low: int, high: int, example: Tensor, *, channels: bool) -> None:
        super().__init__()
        self.low, self.high = low, high
        rows = example.flatten(1) if channels else example.reshape(1, -1)
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-8)
        trials = [largest / high * share / 80 for share in range(1, 101)]
        errors = [((rows / s).round().clamp(low, high) * s - rows).square().mean(1) for s in trials]
        best = torch.stack(errors).argmin(0)
        found = torch.stack(trials)[best, torch.arange(len(rows))]
        shape = (-1, *[1] * (example.dim() - 1)) if channels else ()
        self.scale = nn.Parameter(found.reshape(shape).clone())

    def forward(self, x: Tensor) -> Tensor:
        """Rounded values; the scale has the gradient of LSQ, section 2.2."""
        factor = (x.numel() / self.scale.numel() * self.high) ** -0.5
        scale = self.scale * factor + (self.scale * (1 - factor)).detach()
        steps = (x / scale).clamp(self.low, self.high)
        result: Tensor = ((steps.round() - steps).detach() + steps) * scale
        return result


class HandLayer(nn.Module):
    """A convolution or linear layer whose weight and input are rounded by hand."""

    def __init__(self, layer: Any, weight: int, activation: int, seen: Tensor) -> None:
        super().__init__()
        self.layer = layer
        half = 2 ** (weight - 1)
        values = layer.weight.detach()
        self.of_weight = HandQuantizer(-half, half - 1, values, channels=True)
        # Pictures and what relu gives are never negative.
        self.of_input = HandQuantizer(0, 2**activation - 1, seen, channels=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer, on rounded values."""
        numbers = {"weight": self.of_weight(self.layer.weight)}
        result: Tensor = torch.func.functional_call(self.layer, numbers, (self.of_input(x),))
        return result


def by_hand(
    weight: int, activation: int, checkpoint: nn.Module, pictures: Data, seed: int
) -> float:
    """Train with the quantizers of this file."""
    x = pictures.x
    model = copy.deepcopy(checkpoint).eval()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    seen: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        layer.register_forward_pre_hook(lambda m, args: seen[m].append(args[0])) for layer in layers
    ]
    with torch.no_grad():
        for batch in calibration(x, seed):
            model(batch)
    for handle in handles:
        handle.remove()
    for parent in [*model.modules()]:
        for name, child in [*parent.named_children()]:
            if child in seen:
                setattr(parent, name, HandLayer(child, weight, activation, torch.cat(seen[child])))
    train(DIGITS, model, pictures, EPOCHS, RATE, seed)
    return score(DIGITS, model, pictures)


def results(seed: int, only: str) -> dict[str, float]:
    """The accuracy of every setting, for one seed."""
    torch.set_num_threads(1)
    pictures = DIGITS.data(seed)
    checkpoint = trained_in_float(DIGITS, pictures, seed)
    longer = copy.deepcopy(checkpoint)
    train(DIGITS, longer, pictures, EPOCHS, FLOAT_RATE, seed)
    found = {"float": score(DIGITS, longer, pictures)}
    trials: dict[str, Callable[[], float]] = {}
    for weight, activation in ((4, 4), (2, 4)):
        bits = f"W{weight}A{activation}"
        for name, setting in changed(weight, activation).items():
            trials[f"{bits} {name}"] = lambda s=setting: run(s, checkpoint, pictures, seed)  # type: ignore[misc]
        trials[f"{bits} LSQ by hand"] = lambda w=weight, a=activation: by_hand(  # type: ignore[misc]
            w, a, checkpoint, pictures, seed
        )
    for name, trial in trials.items():
        if only in name or name.endswith("as it is"):
            torch.manual_seed(seed)
            found[name] = trial()
    return found


def print_table(found: Mapping[str, list[float]]) -> None:
    """Means, and differences of each seed to its own float network and its own default."""
    table = Table("setting", "accuracy %", "to float", "to as it is")
    for name, values in found.items():
        default = f"{name.split()[0]} as it is"
        pairs = [("float", values), (default, values)] if default in found else [("float", values)]
        differences = [
            with_error([a - b for a, b in zip(mine, found[other], strict=True)], "+")
            for other, mine in pairs
            if other != name
        ]
        table.add_row(name, with_error(values), *differences)
    show(table)


def main() -> None:
    """Run all seeds, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="how many checkpoints (default: 20)")
    parser.add_argument("--only", default="", help="settings whose name holds this")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with ProcessPoolExecutor(options.jobs) as pool:
        each = pool.map(results, range(options.seeds), [options.only] * options.seeds)
        for result in track(each, "seeds", total=options.seeds):
            for name, value in result.items():
                found.setdefault(name, []).append(value)
    print_table(found)


if __name__ == "__main__":
    main()
