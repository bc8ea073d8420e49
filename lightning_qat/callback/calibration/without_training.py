"""Run training batches of a module for their activations alone: nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_qat.callback.console import say
from lightning_qat.recipe.schedule import Phase, Schedule
from lightning_qat.training.bias_correction import BiasCorrection


class WithoutTraining:
    """Takes a fit through the batches of ``Schedule.calibrate`` and stops it.

    ``training_step`` runs in eval mode and without gradients; there is no backward, no optimizer
    step and no step of a learning rate's schedule. While biases are corrected ``training_step``
    runs twice per batch, with the same random numbers.

    Args:
        schedule: The schedule; with ``train=True`` nothing here does anything.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._put_back: list[Callable[[], None]] = []
        self._correction: BiasCorrection | None = None

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the trainer from training the module, until ``end``."""
        if self._schedule.train:
            return
        step = pl_module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return self._run(lambda: step(*args, **kwargs), pl_module.device)

        # Lightning decides by the parameters, below one decorator, whether it passes the batch's
        # number and that of the data loader.
        update_wrapper(training_step, getattr(step, "__wrapped__", step))

        def optimizer_step(epoch: int, batch: int, optimizer: Any, closure: Any = None) -> None:
            if closure is not None:
                closure()

        self._replace(pl_module, "training_step", training_step)
        self._replace(pl_module, "optimizer_step", optimizer_step)
        self._replace(pl_module, "backward", lambda *args, **kwargs: None)
        configs = trainer.strategy.lr_scheduler_configs
        trainer.strategy.lr_scheduler_configs = []
        modes = {module: module.training for module in pl_module.modules()}

        def put_back() -> None:
            trainer.strategy.lr_scheduler_configs = configs
            for module, training in modes.items():
                module.training = training

        self._put_back.append(put_back)

    def before_batch(self, pl_module: LightningModule, phase: Phase | None) -> None:
        """Set the module's mode, and begin to correct biases once every range is known."""
        if self._schedule.train:
            return
        pl_module.eval()
        corrects = self._schedule.correct_biases and phase is not None and phase.quantizing
        if corrects and self._correction is None:
            say(f"correcting biases on {self._schedule.calibration_batches} batches")
            self._correction = BiasCorrection(pl_module)

    def after_batch(self, trainer: Trainer, batches_seen: int) -> bool:
        """Stop the fit after the last batch, with the biases corrected; return whether it was.

        Args:
            trainer: The trainer.
            batches_seen: How many batches have run.
        """
        schedule = self._schedule
        wanted = schedule.calibration_batches * (2 if schedule.correct_biases else 1)
        if schedule.train or batches_seen < wanted:
            return False
        trainer.should_stop = True
        self.correct()
        return True

    def correct(self) -> None:
        """Correct the biases with the batches so far, if there was one for it."""
        if self._correction is not None:
            changed = self._correction.apply()
            say(f"corrected the biases or batch norm statistics of {changed} layers")
            self._correction = None

    def end(self) -> None:
        """Give the trainer and the module back as they were."""
        for put_back in reversed(self._put_back):
            put_back()
        self._put_back = []
        self._correction = None

    def _run(self, step: Callable[[], Any], device: torch.device) -> Any:
        if self._correction is None:
            return step()
        results = []

        # Of its own device alone: torch warns of states of many that nobody named.
        devices = [device] if device.type == "cuda" else []

        def same_numbers() -> None:
            with torch.random.fork_rng(devices):
                results.append(step())

        with self._correction:
            self._correction.run(same_numbers)
        return results[-1]

    def _replace(self, owner: object, name: str, function: Callable[..., Any]) -> None:
        attributes = vars(owner)
        had, before = name in attributes, attributes.get(name)
        attributes[name] = function

        def put_back() -> None:
            if had:
                attributes[name] = before
            else:
                attributes.pop(name, None)

        self._put_back.append(put_back)
