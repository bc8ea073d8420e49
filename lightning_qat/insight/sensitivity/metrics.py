"""What is measured of a model: the user's metric, or how far its outputs are from float."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_qat.calibrate.batches import run_batch
from lightning_qat.model.containers import leaves_of
from lightning_qat.model.inputs import Inputs

Evaluate = Callable[[Any], Any]
"""The user's function: a model to one number, higher is better."""


class Metric(Protocol):
    """Measures a model, and says what a value costs against the float model's.

    Attributes:
        name: For tables.
    """

    name: str

    def measure(self, model: nn.Module) -> float:
        """The value of a model; the first one is the float model."""
        ...

    def drop(self, value: float, of_float: float) -> float:
        """What a value costs; 0: nothing."""
        ...

    def is_within(self, value: float, of_float: float, budget: float) -> bool:
        """Whether a value keeps a budget."""
        ...


class UserMetric:
    """The user's function.

    Args:
        evaluate: Gets the model in eval mode and returns a number; higher is better.
    """

    name = "metric"

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate

    def measure(self, model: nn.Module) -> float:
        """Call the function.

        Raises:
            TypeError: It returned no number.
            ValueError: It returned NaN or infinity.
        """
        model.eval()
        value = as_number(self._evaluate(model))
        if not math.isfinite(value):
            raise ValueError(f"evaluate must return a finite number; got {value}")
        return value

    def drop(self, value: float, of_float: float) -> float:
        """Float minus quantized."""
        return of_float - value

    def is_within(self, value: float, of_float: float, budget: float) -> bool:
        """At most ``budget`` below the float model."""
        # A metric that is counted in samples meets its budget exactly.
        return of_float - value <= budget + 1e-9 * max(abs(of_float), 1.0)


class _OutputMetric:
    """Compares the outputs on batches with those of the float model, which are kept.

    Args:
        batches: What ``forward`` takes.
    """

    name: str

    def __init__(self, batches: Sequence[Inputs]) -> None:
        self._batches = batches
        self._float: list[list[Tensor]] | None = None

    def measure(self, model: nn.Module) -> float:
        """The value of a model; the first one is the float model."""
        if self._float is None:
            self._float = [_outputs(model, batch) for batch in self._batches]
            if not any(self._float):
                raise ValueError(
                    f"{type(model).__name__}.forward must return a float tensor to be compared "
                    "with float; it returns none. Pass evaluate=."
                )
        pairs = zip(self._batches, self._float, strict=True)
        value = self.of(
            (reference, output)
            for batch, references in pairs
            for reference, output in zip(references, _outputs(model, batch), strict=True)
        )
        if math.isnan(value):
            raise ValueError("the model's outputs must be finite; some are NaN or infinite")
        return value

    def of(self, pairs: Any) -> float:
        """The value of pairs of a float output and another."""
        raise NotImplementedError

    def drop(self, value: float, of_float: float) -> float:
        """What a value costs."""
        raise NotImplementedError

    def is_within(self, value: float, of_float: float, budget: float) -> bool:
        """Whether a value keeps a budget."""
        raise NotImplementedError


class OutputSQNR(_OutputMetric):
    """Signal to quantization noise ratio of the outputs, in decibels, all outputs together."""

    name = "SQNR (dB)"

    def of(self, pairs: Any) -> float:
        """``10 log10(sum(r^2) / sum((r - v)^2))``; infinite where nothing differs."""
        signal = noise = 0.0
        for reference, output in pairs:
            exact = reference.double()
            signal += float(exact.square().sum())
            noise += float((exact - output.double()).square().sum())
        return sqnr_db(signal, noise)

    def drop(self, value: float, of_float: float) -> float:
        """Power of the noise over that of the signal: what several layers add adds up."""
        return 10 ** (-value / 10)

    def is_within(self, value: float, of_float: float, budget: float) -> bool:
        """At least ``budget`` decibels."""
        return value >= budget


class OutputKL(_OutputMetric):
    """Divergence of the softmax of the outputs from float's, in nats per row of the last axis."""

    name = "KL (nats)"

    def of(self, pairs: Any) -> float:
        """Mean of ``sum(p log(p / q))``, ``p`` of the float model."""
        total, rows = 0.0, 0
        for reference, output in pairs:
            p = torch.log_softmax(reference.double(), -1)
            q = torch.log_softmax(output.double(), -1)
            total += float((p.exp() * (p - q)).sum())
            rows += max(1, p.numel() // max(1, p.shape[-1] if p.dim() else 1))
        return max(0.0, total / max(1, rows)) if math.isfinite(total) else math.nan

    def drop(self, value: float, of_float: float) -> float:
        """The divergence."""
        return value

    def is_within(self, value: float, of_float: float, budget: float) -> bool:
        """At most ``budget`` nats."""
        return value <= budget


OUTPUT_METRICS = {"sqnr": OutputSQNR, "kl": OutputKL}
"""By the name that ``sensitivity`` takes."""


def sqnr_db(signal: float, noise: float) -> float:
    """A ratio of powers in decibels.

    Example:
        >>> sqnr_db(100.0, 1.0), sqnr_db(1.0, 0.0), sqnr_db(0.0, 1.0)
        (20.0, inf, -inf)
    """
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def as_number(value: Any) -> float:
    """What ``evaluate`` returned, as a float.

    Raises:
        TypeError: It is no single number.
    """
    size = getattr(value, "size", None)
    count = value.numel() if isinstance(value, Tensor) else size if isinstance(size, int) else None
    if isinstance(value, int | float) or count == 1:
        return float(value)
    kind = type(value).__name__
    if count is not None:
        remedy = f"{kind} of {count} values. Return one of them, or their mean"
    elif value is None:
        remedy = "None. Add a return statement"
    elif isinstance(value, list | tuple | dict):
        remedy = f"{kind}. Return one entry, such as trainer.validate(model, ...)[0]['val_acc']"
    else:
        remedy = f"{kind}. Return a float"
    raise TypeError(f"evaluate must return one number, higher is better; got a {remedy}.")


def _outputs(model: nn.Module, batch: Inputs) -> list[Tensor]:
    """The float tensors that a model returns, on the CPU."""
    leaves = leaves_of(run_batch(model, batch))
    return [x.cpu() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
