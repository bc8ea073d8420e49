"""Validate a module, and changed copies of it, on the same batches and without a word."""

from __future__ import annotations

import logging
import random
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng


class Validation:
    """Runs Lightning's validation loop of a module, any number of times.

    The data are read here, once, for which one batch is run: a split that ``setup`` draws stays the
    same. Each run begins with the same random numbers. Nothing is logged, shown or written.

    Args:
        module: The module. Copies of it may be measured.
        data: Where its batches come from; ``None``: its own ``val_dataloader``.

    Raises:
        ValueError: There are no data, or they are no LightningDataModule; or the module's or the
            data's code has failed.
    """

    def __init__(self, module: LightningModule, data: LightningDataModule | None) -> None:
        if data is not None and not isinstance(data, LightningDataModule):
            raise ValueError(f"data must be a LightningDataModule; got {type(data).__name__}.")
        if data is None and not is_overridden("val_dataloader", module):
            raise ValueError(
                f"{type(module).__name__} has no val_dataloader, so its data must be named: "
                "--datamodule package.file.Class, or --config with a class_path under data."
            )
        self._data = data
        self._loaders: Any = None
        if data is not None:
            # It may close files that the next run reads.
            _replace(data, "teardown")
        self._read(module)

    def metrics(
        self, module: LightningModule, batches: int | None = None, *callbacks: Callback
    ) -> dict[str, float]:
        """What the module logs in validation, by the names that ``monitor`` of a callback takes.

        Args:
            module: The module or a copy of it.
            batches: How many batches of each loader are used; ``None``: all.
            *callbacks: Watch the run.

        Raises:
            ValueError: The module's or the data's code has failed.
        """
        trainer = self._run(module, batches, [*callbacks])
        return {name: float(value) for name, value in trainer.callback_metrics.items()}

    def metric(self, module: LightningModule, name: str, batches: int | None = None) -> float:
        """One number that the module logs in validation.

        Args:
            module: The module or a copy of it.
            name: Its name.
            batches: How many batches of each loader are used; ``None``: all.

        Raises:
            ValueError: Nothing of that name is logged; or the validation has failed.
        """
        return logged(self.metrics(module, batches), name, module)

    def batches(self, module: LightningModule, batches: int) -> tuple[list[Any], dict[str, float]]:
        """The first batches as ``validation_step`` is given them, and what it logs of them.

        Args:
            module: The module or a copy of it.
            batches: How many at most, of each loader.

        Raises:
            ValueError: The module's or the data's code has failed.
        """
        given = _Given()
        found = self.metrics(module, batches, given)
        return given.batches, found

    def _read(self, module: LightningModule) -> None:
        """Read the data as a Trainer does, and have no later run read them again."""
        self._loaders = self._run(module, 1, []).val_dataloaders
        if self._data is not None:
            _replace(self._data, "prepare_data")
            _replace(self._data, "setup")
            _replace(self._data, "val_dataloader", self._loaders)

    def _run(
        self, module: LightningModule, batches: int | None, callbacks: list[Callback]
    ) -> Trainer:
        handler = signal.getsignal(signal.SIGINT)
        try:
            with _quiet(), _same_random_numbers():
                trainer = _trainer(batches, callbacks)
                if self._data is None:
                    trainer.validate(module, self._loaders, verbose=False)
                else:
                    trainer.validate(module, datamodule=self._data, verbose=False)
        except SystemExit as end:
            # After Ctrl-C Lightning ends the program, and ignores the next one.
            if isinstance(end.__context__, KeyboardInterrupt):
                signal.signal(signal.SIGINT, handler)
                raise end.__context__ from None
            raise
        except Exception as error:  # the user's code runs in it
            raise ValueError(
                f"{type(module).__name__} cannot be validated: {type(error).__name__}: {error}"
            ) from error
        return trainer


def _trainer(batches: int | None, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        # Code that calls self.logger.experiment goes on working.
        logger=DummyLogger(),
        callbacks=callbacks,
        limit_val_batches=1.0 if batches is None else batches,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # What an inference run leaves in a module cannot be copied or changed.
        inference_mode=False,
    )


def logged(metrics: Mapping[str, float], name: str, module: LightningModule) -> float:
    """One of the numbers that a module has logged.

    Raises:
        ValueError: Nothing of that name is logged; the message lists what is.
    """
    if name not in metrics:
        names = ", ".join(map(repr, metrics)) or "nothing"
        raise ValueError(
            f"{type(module).__name__} must log {name!r} in validation; it logs {names}. Name one "
            f"of these, or call self.log({name!r}, ...) in validation_step."
        )
    return metrics[name]


class _Given(Callback):
    """Keeps the batches of a run."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_validation_batch_start(self, *arguments: Any, **_: Any) -> None:
        """Keep the batch: the arguments are trainer, module, batch and numbers."""
        self.batches.append(arguments[2])


def _replace(data: LightningDataModule, name: str, result: Any = None) -> None:
    """Have a method of the data do nothing but return something."""

    def instead(*_: Any, **__: Any) -> Any:
        return result

    setattr(data, name, instead)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    with isolate_rng():
        random.seed(0)
        np.random.seed(0)  # the generator that users' data sets draw from
        torch.manual_seed(0)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's lines on devices, and advice on how to train."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
