"""Every calibration, scheme and granularity on the user's own data: the error of each layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qat.calibrate.batches import as_batches, observe, run_batch
from lightning_qat.function_hooks.running import hide_from_hooks
from lightning_qat.insight.plots import lines
from lightning_qat.insight.sensitivity.metrics import OutputSQNR, sqnr_db
from lightning_qat.model.inputs import Inputs
from lightning_qat.model.torch_compile import unwrapped
from lightning_qat.numerics.arithmetic import rounded
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat.prepare.prepare import prepare
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.names import INPUT, quantizer_role
from lightning_qat.quantizers.switches import switch
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.recipe import Recipe


@dataclass(frozen=True)
class CalibrationRow:
    """The error of one tensor under one setting.

    Args:
        setting: The calibration, such as ``mse``; ``symmetric`` or ``affine`` with the recipe's
            calibration; ``per_channel`` or ``per_tensor`` weights.
        layer: Dotted name of the layer; of the outputs of the whole model ``outputs``.
        tensor: ``input``, ``weight`` or ``outputs``.
        sqnr_db: Signal to quantization noise ratio in decibels.
        mse: Mean squared error; of outputs NaN.
    """

    setting: str
    layer: str
    tensor: str
    sqnr_db: float
    mse: float


@dataclass(frozen=True)
class CalibrationStudy:
    """Errors by setting and layer. ``print`` shows them side by side.

    Args:
        rows: One for each setting and tensor.
    """

    rows: tuple[CalibrationRow, ...]

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings, in the order in which they were measured."""
        return tuple(dict.fromkeys(row.setting for row in self.rows))

    def sqnr(self, setting: str) -> dict[str, float]:
        """Decibels by tensor, such as ``conv1.input`` or ``outputs``, under a setting."""
        return {_name(row): row.sqnr_db for row in self.rows if row.setting == setting}

    def best(self) -> dict[str, str]:
        """The setting with the least error, for each tensor."""
        best: dict[str, CalibrationRow] = {}
        for row in self.rows:
            known = best.setdefault(_name(row), row)
            if row.sqnr_db > known.sqnr_db:
                best[_name(row)] = row
        return {name: row.setting for name, row in best.items()}

    def __str__(self) -> str:
        """A table: tensors down, settings across, decibels; the best of each line has a star."""
        names, best = tuple(dict.fromkeys(map(_name, self.rows))), self.best()
        found = {setting: self.sqnr(setting) for setting in self.settings}
        table = [["SQNR (dB)", *self.settings]]
        for name in names:
            cells = [
                f"{found[s][name]:.1f}{'*' if best[name] == s else ' '}" if name in found[s] else ""
                for s in self.settings
            ]
            table.append([name, *cells])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
            for line in table
        )

    def plot(self, path: str | Path) -> None:
        """Draw a curve over the layers' inputs for each calibration; the suffix gives the format.

        Raises:
            ImportError: matplotlib is missing.
        """
        inputs = [row for row in self.rows if row.tensor == "input"]
        layers = tuple(dict.fromkeys(row.layer for row in inputs))
        curves = {
            setting: [found.get(f"{layer}.input", math.nan) for layer in layers]
            for setting in dict.fromkeys(row.setting for row in inputs)
            if (found := self.sqnr(setting))
        }
        lines(path, layers, curves, title="inputs of layers by calibration", label="SQNR (dB)")


@naming_memory_errors(
    "comparing calibrations",
    "Give it smaller or fewer batches",
)
def calibration_study(
    model: nn.Module,
    data: Any,
    recipe: Recipe | Mapping[str, Any] | str | Path = "int8",
    *,
    example_inputs: Inputs | None = None,
) -> CalibrationStudy:
    """Compare all calibrations, both schemes and both granularities of weights on data.

    A layer's error is that of its own input and weight: the float tensor against what its grid
    makes of it. Those of the outputs are with everything quantized. Each setting changes one thing
    in the recipe.

    Args:
        model: A float model; it is copied and not changed.
        data: Batches of what ``forward`` takes: several, as training would see them.
        recipe: What the settings change.
        example_inputs: What ``forward`` takes, to plan the tensors between layers; by default the
            first of ``data``.

    Returns:
        A row for each setting and tensor.

    Raises:
        ValueError: There is nothing to quantize, the model is quantized already, or data are empty.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> study = calibration_study(model, [torch.randn(16, 4)])
        >>> sorted(study.sqnr("mse"))
        ['0.input', '2.input', 'outputs']
    """
    recipe = Recipe.load(recipe)
    model = unwrapped(model)
    if any(isinstance(module, Quantizer) for module in model.modules()):
        raise ValueError(
            f"calibration_study takes a float model and prepares copies of it; this "
            f"{type(model).__name__} is quantized already."
        )
    batches = as_batches(data)
    example = batches[0] if example_inputs is None else example_inputs
    outputs = OutputSQNR(batches)
    outputs.measure(model)
    rows: list[CalibrationRow] = []
    for setting, changed in _settings(recipe):
        copied = copy.deepcopy(model)
        prepare(copied, changed, example)
        observe(copied, batches)
        of_weights = setting.startswith("per_")
        found = _weights(copied) if of_weights else _inputs(copied, batches)
        rows += [CalibrationRow(setting, *error) for error in found]
        switch(copied, quantizing=True)
        value = outputs.measure(copied)
        rows.append(CalibrationRow(setting, "", "outputs", value, math.nan))
    return CalibrationStudy(tuple(rows))


def _settings(recipe: Recipe) -> Iterator[tuple[str, Recipe]]:
    for calibration in CALIBRATIONS:
        spec = replace(recipe.activation, calibration=calibration)  # type: ignore[arg-type]
        yield calibration, replace(recipe, activation=spec)
    if recipe.activation.bits <= 8:
        for scheme in ("affine", "symmetric"):
            symmetric = scheme == "symmetric"
            fixed_min = None if symmetric else recipe.activation.fixed_min
            spec = replace(recipe.activation, symmetric=symmetric, fixed_min=fixed_min)
            yield scheme, replace(recipe, activation=spec)
    for granularity in ("per_channel", "per_tensor"):
        weight = replace(recipe.weight, granularity=granularity)
        yield granularity, replace(recipe, weight=weight)


Errors = Iterator[tuple[str, str, float, float]]
"""Layer, kind of tensor, decibels, mean squared error."""


def _weights(model: nn.Module) -> Errors:
    for path, layer in model.named_modules():
        for child, quantizer in layer.named_children():
            name = child.replace("weight_quantizer", "weight")
            weight = getattr(layer, name, None)
            if isinstance(quantizer, WeightQuantizer) and isinstance(weight, Tensor):
                quantizer.quantizing = True
                with torch.no_grad():
                    noise = (quantizer(weight) - weight).double().square()
                signal = float(weight.detach().double().square().sum())
                yield path, "weight", sqnr_db(signal, float(noise.sum())), float(noise.mean())


def _inputs(model: nn.Module, batches: Sequence[Inputs]) -> Errors:
    """Run the float model, and round every layer's input beside it."""
    sums: dict[str, list[float]] = {}
    with _rounded_beside(model, sums):
        for batch in batches:
            run_batch(model, batch)
    for path, (signal, noise, count) in sums.items():
        yield path, "input", sqnr_db(signal, noise), noise / max(1.0, count)


@contextmanager
def _rounded_beside(model: nn.Module, sums: dict[str, list[float]]) -> Iterator[None]:
    readers: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        layer, _, name = path.rpartition(".")
        if isinstance(module, ActivationQuantizer) and quantizer_role(name) == "activation":
            known = layer if name == INPUT else path.replace("_quantizer", "")
            readers.setdefault(module, []).append(known)

    def note(quantizer: Any, args: tuple[Any, ...]) -> None:
        with hide_from_hooks():
            x = args[0].detach().float()
            scale, zero_point = quantizer.scale_and_zero_point()
            error = (rounded(x, scale, zero_point, quantizer.grid) - x).double()
            signal, noise = x.double().square().sum(), error.square().sum()
        added = float(signal), float(noise), float(x.numel())
        for path in readers[quantizer]:
            known = sums.setdefault(path, [0.0, 0.0, 0.0])
            sums[path] = [a + b for a, b in zip(known, added, strict=True)]

    handles = [quantizer.register_forward_pre_hook(note) for quantizer in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _name(row: CalibrationRow) -> str:
    return f"{row.layer}.{row.tensor}".lstrip(".")
