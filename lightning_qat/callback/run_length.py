"""The length of a Trainer's run, in epochs or steps as the schedule counts."""

from __future__ import annotations

import math

from lightning.pytorch import LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_qat.callback.console import say
from lightning_qat.callback.lightning_private import load_train_data
from lightning_qat.recipe.schedule import Milestones, Schedule


def resolve(
    schedule: Schedule,
    trainer: Trainer,
    pl_module: LightningModule,
    start: tuple[int, int] = (0, 0),
) -> Milestones:
    """The milestones of a schedule in this run.

    Args:
        schedule: The schedule.
        trainer: The trainer.
        pl_module: The module.
        start: The epoch and the step that quantization-aware training began with.

    Raises:
        ValueError: A fraction is given and the run has no end or none that is known, or the run
            ends before it is quantized.
    """
    total = run_length(schedule, trainer, pl_module)
    epoch, step = start
    steps = None
    if schedule.interval == "epoch" and trainer.max_steps > 0 and not _has_length(trainer):
        steps = step, trainer.max_steps
    milestones = schedule.resolve(total, epoch if schedule.interval == "epoch" else step, steps)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        _check_reached(schedule, total)
        _check_calibration(schedule, milestones, trainer, start)
    return milestones


def run_length(schedule: Schedule, trainer: Trainer, pl_module: LightningModule) -> float:
    """Epochs or optimizer steps of the run; infinite when it has no end, or none that is known."""
    steps = float(trainer.estimated_stepping_batches)
    if steps < 0:  # what Lightning says of data without a length
        steps = math.inf
    if schedule.interval == "step":
        if not pl_module.automatic_optimization:
            # Each optimizer's steps count, and only the module knows how many it takes.
            return trainer.max_steps if trainer.max_steps > 0 else math.inf
        return steps
    epochs = math.inf
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        epochs = trainer.max_epochs
    if math.isfinite(steps) and trainer.max_steps > 0 and _has_length(trainer):
        per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        epochs = min(epochs, math.ceil(steps / max(per_epoch, 1)))
    return epochs


def _has_length(trainer: Trainer) -> bool:
    """Whether the number of batches in an epoch is known: an ``IterableDataset`` has none."""
    # Not yet done where max_steps alone limits the run.
    load_train_data(trainer)
    return math.isfinite(trainer.num_training_batches)


def _check_reached(schedule: Schedule, total: float) -> None:
    """Refuse, or warn of, milestones that the run ends before."""
    what = f"this run ends after {total:g} {schedule.interval}s"
    start = schedule.quantize_from
    if isinstance(start, int) and start >= total:
        raise ValueError(
            f"Schedule: quantize_from={start}, but {what}, so nothing would ever be quantized. "
            "Start earlier, or train longer."
        )
    for name in ("freeze_observers", "freeze_batchnorm"):
        value = getattr(schedule, name)
        # A fraction of a short run may round up to its end; it was not meant as a date.
        if isinstance(value, int) and value >= total:
            rank_zero_warn(
                f"Schedule: {name}={value}, but {what}, so it never happens. Write {name}=None to "
                "say so, or an earlier one."
            )


def _check_calibration(
    schedule: Schedule, milestones: Milestones, trainer: Trainer, start: tuple[int, int]
) -> None:
    """Say before training that it ends within calibration."""
    if not _has_length(trainer):
        return
    begins = max(milestones.quantize_from, start[0] if schedule.interval == "epoch" else start[1])
    at_once = trainer.accumulate_grad_batches
    batches, before = math.inf, begins * trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        batches = trainer.max_epochs * float(trainer.num_training_batches)
    if trainer.max_steps > 0:
        batches = min(batches, trainer.max_steps * at_once)
    if schedule.interval == "step":
        before = begins * at_once
    left = batches - before
    wanted = schedule.calibration_batches
    if schedule.train and left <= wanted:
        say(
            f"warning: this run has {left:g} batches to quantize in, and calibration takes "
            f"{wanted}, so nothing would train quantized. Train longer, or lower "
            "Schedule.calibration_batches or quantize_from."
        )
    elif left < wanted:
        say(
            f"warning: this run has {left:g} of the {wanted} batches to calibrate on, so no bias "
            "would be corrected. Raise max_epochs, or calibrate on fewer batches."
        )
