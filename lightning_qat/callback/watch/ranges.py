"""Quantized tensors that lose much of what they hold, or have nothing to be given a range by."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lightning_qat.callback.watch.losses import Problem
from lightning_qat.model.torch_compile import plain_path
from lightning_qat.quantizers.names import place
from lightning_qat.training.range_sync import activation_quantizers
from lightning_qat.training.step_statistics import Statistics

MOST_CLIPPED = 0.1
"""Share of a tensor's values outside its range."""
FEWEST_INTEGERS = 16
"""Of at least 256 that the grid has."""
_FEWEST_VALUES = 256
"""Smaller samples, and those of few different values, say nothing about integers."""
_CONSTANT_VALUES = 16
"""So many values that are all the same are a fault; a few may be."""
_NAMED = 3


def range_problems(model: nn.Module, statistics: Statistics) -> Iterator[Problem]:
    """One message for what is clipped most, one for what is on few integers, one for constants.

    Args:
        model: The prepared model.
        statistics: Of one of its training steps.

    Yields:
        What is wrong in a word, and the message.
    """
    samples = {name: values.cpu() for name, values in statistics.values.items()}
    clipped, few, constant = [], [], []
    for path, quantizer in activation_quantizers(model).items():
        name = place(plain_path(path))
        share = statistics.numbers.get(f"clipped/{name}", 0.0)
        if share > MOST_CLIPPED:
            clipped.append((share, name))
        values = samples.get(name)
        if values is not None and len(values) >= _CONSTANT_VALUES and values.min() == values.max():
            constant.append((float(values[0]), name))
        steps = quantizer.grid.qmax - quantizer.grid.qmin
        ends = [statistics.numbers.get(f"range_{end}/{name}") for end in ("min", "max")]
        if values is None or steps < 255 or None in ends or len(values) < _FEWEST_VALUES:
            continue
        low, high = (float(end) for end in ends if end is not None)
        used = _used(values, low, high, steps)
        if used < FEWEST_INTEGERS and _different(values) >= _FEWEST_VALUES:
            few.append((used, name))
    if clipped:
        yield (
            "clipped",
            f"more than {MOST_CLIPPED:.0%} of the values lie outside of the range of "
            f"{_worst(sorted(clipped, reverse=True), '.0%')}, and get no gradient there. Give "
            "these layers activation: {calibration: minmax} by an override, a wider clip if they "
            "have one, or calibrate on more batches (Schedule.calibration_batches)",
        )
    if constant:
        yield (
            "constant",
            f"all values are the same in {_worst(constant, 'g')}, which gives no range to quantize "
            "on. Check the training data and whether a layer before it is dead; calibrate on data "
            "as the device will see them, or leave these layers out by exclude",
        )
    if few:
        yield (
            "few integers",
            f"fewer than {FEWEST_INTEGERS} integers are used by {_worst(sorted(few), 'd')}: a few "
            "values are far larger than the rest. Give these layers activation: {calibration: "
            "percentile} by an override, or leave them out by exclude",
        )


def _used(values: Tensor, low: float, high: float, steps: int) -> int:
    scale = (high - low) / steps
    return _different(torch.round((values - low) / scale).clamp(0, steps))


def _different(values: Tensor) -> int:
    return len(np.unique(values.numpy()))


def _worst(found: list[tuple[float, str]], form: str) -> str:
    named = ", ".join(f"{name!r} ({value:{form}})" for value, name in found[:_NAMED])
    rest = len(found) - _NAMED
    return f"{named} and {rest} more" if rest > 0 else named
