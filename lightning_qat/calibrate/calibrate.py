"""Quantize a float model without training it (post-training quantization)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_qat.calibrate.batches import as_batches, observe, run_batch, without_range
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.torch_compile import unwrapped
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.report import PrepareReport
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.names import place
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.bias_correction import BiasCorrection
from lightning_qat.training.phases import finish
from lightning_qat.training.range_sync import activation_quantizers


@naming_memory_errors("calibrating the model", "Give it smaller or fewer batches.")
def calibrate(
    model: nn.Module,
    data: Any,
    recipe: Recipe | Mapping[str, Any] | str | Path = "int8",
    *,
    example_inputs: Inputs | None = None,
    correct_biases: bool = True,
) -> PrepareReport:
    """Quantize a float model on some batches, without labels and without training.

    The model becomes a QAT model in place, as `prepare` makes it; every tensor gets its range from
    the batches, and biases and batch norms take back what quantization shifts (`BiasCorrection`).
    Then `convert` and `export` it, or train it on.

    Args:
        model: A float model; its mode stays what it is.
        data: Batches of what ``forward`` takes: an iterable of them, or one tensor. Some hundred
            samples as training sees them.
        recipe: What is quantized how.
        example_inputs: What ``forward`` takes, to plan the tensors between layers; by default the
            first of ``data``.
        correct_biases: Compare every layer with the float model and correct its mean. Runs each
            batch twice more.

    Returns:
        The layers and the tensors between them that are quantized.

    Raises:
        ValueError: There is nothing to quantize, the model is quantized already, ``data`` are empty
            or not finite, or an example does not fit ``forward``.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
        >>> report = calibrate(model, [torch.randn(16, 4) for _ in range(4)])
        >>> [layer.name for layer in report.swapped]
        ['0', '2']
    """
    model = unwrapped(model)
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError(
            f"calibrate takes a float model; this {type(model).__name__} is quantized already, and "
            "its trained ranges would be lost. Convert it, or load the float checkpoint."
        )
    batches = as_batches(data)
    report = prepare(model, recipe, batches[0] if example_inputs is None else example_inputs)
    observe(model, batches)
    _warn_of_odd_ranges(model)
    if correct_biases:
        correction = BiasCorrection(model)
        with correction:
            for batch in batches:
                correction.run(partial(run_batch, model, batch))
        correction.apply()
    finish(model)
    return report


def _warn_of_odd_ranges(model: nn.Module) -> None:
    """Say which tensors no batch has reached, and which were the same number everywhere."""
    problems = []
    missing = without_range(model)
    if missing:
        problems.append(
            f"no batch reached {_listed(missing)}, so no range is known there: convert refuses the "
            "model if its forward uses them in eval mode"
        )
    constant = [
        place(name)
        for name, quantizer in activation_quantizers(model).items()
        if quantizer.calibrated and bool(quantizer.min_val == quantizer.max_val)
    ]
    if constant:
        problems.append(
            f"{_listed(constant)} had the same value in all batches, which gives no range worth "
            "having: calibrate on real data, not on zeros"
        )
    if problems:
        warnings.warn("calibrate: " + "; ".join(problems) + ".", stacklevel=3)


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
