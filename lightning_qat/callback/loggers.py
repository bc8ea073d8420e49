"""What goes to Lightning's loggers: agreements of files, and the quantizers of a step."""

from __future__ import annotations

import re

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.export.delivery.manifest import MANIFEST
from lightning_qat.export.delivery.result import ExportResult
from lightning_qat.model.torch_compile import is_compiled
from lightning_qat.training.step_statistics import Statistics, StepStatistics

_BINS = 64
"""Of a histogram: TensorBoard's own choice of 1,500 takes longer than the statistics."""

_MOST = 20
"""So many notes of one target are printed; the manifest has all."""


def log_agreement(trainer: Trainer, result: ExportResult) -> None:
    """Print what differs from the plan, notes and agreement; log each runtime's largest difference.

    Warnings say what the agreement does not show. Logged are ``qat/<target>/max_steps``, the
    largest of all, and ``qat/<target>/<runtime>/max_steps``.
    """
    found = result.artifact
    notes = () if found is None else (*found.differences, *found.notes)
    for note in notes[:_MOST]:
        say(f"{result.target}: {note}")
    if len(notes) > _MOST:
        say(f"{result.target}: {len(notes) - _MOST} more notes are in {MANIFEST}.")
    agreement = result.agreement
    if agreement is None:
        return
    say(str(agreement))
    for caution in agreement.cautions:
        rank_zero_warn(f"QAT: {result.target}: {caution}")
    if not agreement.runtimes:
        return
    metrics = {
        f"qat/{result.target}/{re.sub(r'[^0-9a-zA-Z]+', '_', r.runtime)}/max_steps": r.max_steps
        for r in agreement.runtimes
    }
    metrics[f"qat/{result.target}/max_steps"] = max(metrics.values())
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def check_interval(log: object) -> None:
    """Refuse what is no number of steps.

    Raises:
        ValueError: ``log`` is neither ``None`` nor a positive int.
    """
    if log is not None and (not isinstance(log, int) or isinstance(log, bool) or log < 1):
        raise ValueError(f"log must be None or a number of steps, such as 50; got {log!r}.")


class QuantizationLog:
    """Logs the quantizers of every n-th step, on the first process.

    Args:
        interval: The number of optimizer steps between two; ``None``: nothing is logged.
    """

    def __init__(self, interval: int | None) -> None:
        self.interval = interval
        self._step: StepStatistics | None = None
        self._last: int | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before a batch: look at it, if it is the first one of a step that is logged."""
        if self.interval is None or trainer.global_step % self.interval:
            return
        if trainer.global_step == self._last or not (trainer.loggers and trainer.is_global_zero):
            return
        if self._last is None and is_compiled(pl_module):
            say(
                "what is clipped is not logged: a part of the module is compiled, and looking "
                "inside would compile it anew; ranges and weights are logged"
            )
        self._last = trainer.global_step
        self._step = StepStatistics(pl_module)

    def finish(self, trainer: Trainer) -> None:
        """After the batch: log what was seen."""
        step, self._step = self._step, None
        if step is None or self._last is None:
            return
        statistics = step.finish()
        for logger in trainer.loggers:
            metrics = {f"qat/{name}": value for name, value in statistics.numbers.items()}
            if metrics:
                logger.log_metrics(metrics, step=self._last)
            _log_histograms(logger, statistics, self._last)

    def cancel(self) -> None:
        """Forget a batch that did not end, and the run: the next one begins with step 0 again."""
        if self._step is not None:
            self._step.cancel()
        self._step = self._last = None


def _log_histograms(logger: object, statistics: Statistics, step: int) -> None:
    """To loggers whose experiment takes histograms, as TensorBoard's does."""
    add = getattr(getattr(logger, "experiment", None), "add_histogram", None)
    if callable(add):
        for name, values in statistics.values.items():
            add(f"qat/{name}", values.float().cpu().numpy(), global_step=step, bins=_BINS)
