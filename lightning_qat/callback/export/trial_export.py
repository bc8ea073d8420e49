"""The trial before training: capture the untrained model, and try every exporter on it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.convert.convert import convert_untrained
from lightning_qat.convert.needed_inputs import needed_for_a_number
from lightning_qat.export.delivery.result import error_text
from lightning_qat.export.protocol import Cautioning, Exporter
from lightning_qat.export.trial import Trial, try_exporters
from lightning_qat.ir.quantized_model import QuantizedModel


class TrialFailed(RuntimeError):
    """Exports that would fail after training, found before."""


def try_exports(
    pl_module: LightningModule,
    inputs: Any,
    exporters: Sequence[Exporter],
    *,
    tries: bool,
    dynamic_shapes: Any,
    export_outputs: Sequence[str] | None,
    timeout: float | None,
) -> None:
    """Capture a prepared module and try exporters on it; the module and random state stay.

    What exporters caution of is said in either case.

    Args:
        pl_module: The module, prepared; ranges that it does not have yet are made up.
        inputs: Example inputs of its ``forward``.
        exporters: One per target.
        tries: Try the exporters; else only the capture is tried.
        dynamic_shapes: As for ``convert``.
        export_outputs: As for ``convert``.
        timeout: As for ``export_all``.

    Raises:
        CaptureError: ``forward`` cannot be captured.
        TrialFailed: With what all exporters say.
    """
    began = time.monotonic()
    with isolate_rng(include_cuda=False):
        with warnings.catch_warnings():
            # The export after training says the same again, with final numbers.
            warnings.simplefilter("ignore")
            quantized = convert_untrained(
                pl_module, inputs, dynamic_shapes=dynamic_shapes, export_outputs=export_outputs
            )
        trial = try_exporters(quantized, exporters if tries else (), began=began, timeout=timeout)
    hint = _hint(quantized)
    if trial.errors:
        lines = [
            f"{len(trial.errors)} of {len(exporters)} exports failed on the untrained model, and "
            "would fail after training (trial_export=False trains all the same).",
            *(f"{target}: {error_text(e)}" for target, e in trial.errors.items()),
        ]
        raise TrialFailed("\n".join([*lines, hint] if hint else lines))
    if exporters and tries:
        say(f"{_in_words(trial)}; {shapes_in_words(quantized)}")
    for exporter in exporters:
        for text in exporter.cautions(quantized) if isinstance(exporter, Cautioning) else ():
            say(f"{exporter.name}: {text}")
    if hint:
        rank_zero_warn(f"QAT: {hint}")


def shapes_in_words(model: QuantizedModel) -> str:
    """Which sizes of a model's inputs are fixed and which dynamic, in one line."""
    shapes = ", ".join(
        f"{name}: {' x '.join(map(str, shape)) or 'one number'}"
        for name, shape in model.input_shapes.items()
    )
    names = {size for shape in model.input_shapes.values() for size in shape}
    dynamic = sorted(name for name in names if isinstance(name, str))
    words = f"{', '.join(dynamic)} dynamic, all else fixed" if dynamic else "all sizes fixed"
    args, kwargs = model.example_inputs
    unneeded = [name for name, value in kwargs.items() if value is None]
    unneeded += [f"argument {i}" for i, value in enumerate(args) if value is None]
    left_out = f"; not needed: {', '.join(unneeded)}" if unneeded else ""
    return f"inputs {shapes} ({words}{left_out})"


def _in_words(trial: Trial) -> str:
    text = f"trial export of the untrained model: {', '.join(trial.passed)} passed"
    if trial.untried:
        text += f", {', '.join(trial.untried)} not tried for lack of time"
    return f"{text} ({trial.seconds:.1f} s)"


def _hint(model: QuantizedModel) -> str:
    """Say which outputs look like a loss, and which inputs only that loss needs."""
    found = needed_for_a_number(model.program)
    if not found:
        return ""
    numbers = [repr(name) for i, name in enumerate(model.output_names) if i in found]
    kept = [name for i, name in enumerate(model.output_names) if i not in found]
    inputs = sorted({name for names in found.values() for name in names})
    return (
        f"forward returns {', '.join(numbers)}, a single number, and for that alone the "
        f"files take {', '.join(map(repr, inputs))}, as a loss takes labels. Export what a device "
        f"needs: QATCallback(export_outputs={kept!r})."
    )
