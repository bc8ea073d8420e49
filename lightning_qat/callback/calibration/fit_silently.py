"""A fit for a callback's sake: one process, nothing logged, shown or saved."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden


def fit_silently(
    module: LightningModule, data: LightningDataModule | None, callback: Callback, folder: Path
) -> None:
    """Fit a module on the CPU until the callback stops the run; nothing is validated.

    Args:
        module: The module.
        data: Where its batches come from; ``None``: its own ``train_dataloader``.
        callback: Stops the run.
        folder: The trainer's root.

    Raises:
        ValueError: The module has no training data, or its code or the data's has failed.
    """
    name = type(module).__name__
    if data is None and not is_overridden("train_dataloader", module):
        raise ValueError(
            f"{name} has no train_dataloader, so its data must be named: --datamodule "
            "package.file.Class, or --config with a class_path under data."
        )
    trainer = Trainer(
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[callback],
    )
    try:
        trainer.fit(module, datamodule=data)
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:  # the user's module and data run
        raise ValueError(f"{name} cannot be calibrated: {type(error).__name__}: {error}") from error
