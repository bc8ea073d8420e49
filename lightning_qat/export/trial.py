"""Try exporters on a model before it is trained: what a target cannot express shows at once."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_qat.export.delivery.guard import watched_interrupts
from lightning_qat.export.delivery.one_target import Order, export_one
from lightning_qat.export.delivery.own_process import export_apart
from lightning_qat.export.protocol import Exporter
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.work_folder import work_folder

SECONDS = 60.0
"""What a trial of all targets may take, about."""


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Args:
        errors: By target, what its exporter raised.
        passed: Targets that wrote their files.
        untried: Targets that were not tried for lack of time.
        seconds: What it took.
    """

    errors: dict[str, BaseException]
    passed: tuple[str, ...]
    untried: tuple[str, ...]
    seconds: float


def try_exporters(
    model: QuantizedModel,
    exporters: Sequence[Exporter],
    *,
    began: float | None = None,
    seconds: float = SECONDS,
    timeout: float | None = None,
) -> Trial:
    """Export a model to a temporary folder, for every target, without a word.

    Errors of the machine (``OSError``, ``MemoryError``) say nothing of the model and count as
    passed: they may be gone when training ends.

    Args:
        model: A converted model, such as ``convert_untrained`` gives.
        exporters: One per target.
        began: ``time.monotonic()`` when the work on the trial began, the capture included; now by
            default.
        seconds: No target is begun that would end later than this if it took what the capture
            took. One that is running is not stopped: its converter may hold global state.
        timeout: As for ``export_all``.
    """
    began = time.monotonic() if began is None else began
    errors: dict[str, BaseException] = {}
    passed, untried = [], []
    capture = time.monotonic() - began
    with (
        work_folder(Path(tempfile.gettempdir())) as folder,
        warnings.catch_warnings(),
        watched_interrupts() as interrupts,
    ):
        # The export after training says the same again, with final numbers.
        warnings.simplefilter("ignore")
        if timeout is not None:
            model.save(folder / "model.pt2")
        for exporter in exporters:
            if time.monotonic() - began + capture > seconds:
                untried.append(exporter.name)
                continue
            order = Order(folder / exporter.name, check=False)
            if timeout is None:
                error = export_one(model, exporter, order, interrupts).error
            else:
                error = export_apart(folder / "model.pt2", exporter, order, timeout).error
            of_machine = isinstance(error, OSError | MemoryError)
            if error is None or (of_machine and not isinstance(error, TimeoutError)):
                passed.append(exporter.name)
            else:
                errors[exporter.name] = error
    return Trial(errors, tuple(passed), tuple(untried), time.monotonic() - began)
