"""What everybody is trained, calibrated and compared with."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.task import BATCH, Data, Task
from lightning_qat.quantizers.factory import quantizer_parameters
from lightning_qat.recipe.schedule import Phase
from lightning_qat.training.bias_correction import BiasCorrection
from lightning_qat.training.phases import apply_phase
from lightning_qat.training.range_sync import commit_ranges


def batches(x: Tensor, y: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, without the incomplete batch at its end."""
    order = torch.randperm(len(x), generator=generator)
    for start in range(0, len(x) - BATCH + 1, BATCH):
        chosen = order[start : start + BATCH]
        yield x[chosen], y[chosen]


def train(
    task: Task,
    model: nn.Module,
    data: Data,
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
    steps = epochs * (len(data.x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        if epoch == 6 * epochs // 10:
            freeze(model)
        for x, y in batches(data.x, data.y, generator):
            model.train()
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(x), y))
            optimizer.step()
            schedule.step()
            commit_ranges(model)


def trained_in_float(task: Task, data: Data, seed: int) -> nn.Module:
    """The checkpoint that everybody starts from; the weights before it are those of the seed."""
    torch.manual_seed(seed)
    model = task.network()
    train(task, model, data, task.float_epochs, task.float_rate, seed)
    return model


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
