"""Parts of Lightning that it does not promise to keep, one function each.

Everything else that the callback uses is Lightning's public interface. If a new Lightning breaks
one of these, ``tests/callback/test_private_hooks.py`` fails, and this file is where to mend it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (  # type: ignore[attr-defined] # XLA: not in __all__
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,  # pyright: ignore[reportPrivateImportUsage]
    Strategy,
    XLAStrategy,  # pyright: ignore[reportPrivateImportUsage]
)
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_qat.callback.patch_once import PatchOnce

UNSUPPORTED_STRATEGIES: tuple[type[Strategy], ...] = (
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceXLAStrategy,
    XLAStrategy,
)
"""Strategies that cannot train quantized layers. They are named because DeepSpeed's and XLA's are
subclasses of strategies that can.

Without Lightning's XLA classes: ``import lightning_qat.callback`` fails; drop the missing names.
"""


def after_configure_model(pl_module: LightningModule, function: Callable[[], None]) -> PatchOnce:
    """Call a function after the module's next ``configure_model``.

    No callback hook runs between ``configure_model`` and the restoring of a checkpoint. Without
    this order (``setup`` hooks, ``configure_model``, checkpoint, optimizers) layers that
    ``configure_model`` makes are not quantized, and checkpoints of a QAT run do not load.
    """
    return PatchOnce(pl_module, "configure_model", after=function)


def before_weights_are_loaded(
    pl_module: LightningModule, function: Callable[[Mapping[str, Any]], None]
) -> PatchOnce:
    """Call a function with the checkpoint before the module's next ``on_load_checkpoint``.

    No callback hook runs between the reading of a checkpoint and the loading of its weights.
    Without this order a checkpoint that does not fit is reported by torch, as a list of keys.
    """
    return PatchOnce(pl_module, "on_load_checkpoint", before=function)


def before_checkpoint_is_read(
    trainer: Trainer, function: Callable[[str | Path, bool | None], None]
) -> PatchOnce:
    """Call a function with the path before the trainer next reads a checkpoint.

    Its second argument is what ``weights_only`` was given as: ``None`` by nobody, ``False`` also
    for Lightning before 2.6, which has no such argument and trusts every file. No callback hook
    runs before the reading. Without this order a file that cannot be read is reported by torch.
    """
    strategy: Any = trainer.strategy
    asks = "weights_only" in signature(strategy.load_checkpoint).parameters

    def before(checkpoint_path: str | Path, weights_only: bool | None = None) -> None:
        function(checkpoint_path, weights_only if asks else False)

    return PatchOnce(strategy, "load_checkpoint", before=before)


def load_train_data(trainer: Trainer) -> None:
    """Make the train dataloader now, so that ``trainer.num_training_batches`` is known.

    Without it the length in epochs of a run that ``max_steps`` alone limits is not known before
    its first batch, and fractions in a ``Schedule`` must be refused for it.
    """
    trainer.fit_loop.setup_data()


def resume_train_data(trainer: Trainer) -> None:
    """Let stateful train dataloaders go on where the checkpoint says, if nobody has done so.

    Lightning gives them their states when it makes the loop's loader. Whoever asks for the length
    of the run before a checkpoint is restored (``load_train_data``, or
    ``trainer.estimated_stepping_batches`` in ``configure_optimizers``) has that done too early,
    and the states are left over. Uses ``_combined_loader_states_to_load``,
    ``_load_combined_loader_states`` and ``_data_fetcher`` of the fit loop. Without them a stateful
    loader begins its epoch anew on a resume, as others do.
    """
    loop: Any = trainer.fit_loop
    if getattr(loop, "_combined_loader_states_to_load", None) and loop.restarting:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def loads_weights_after_wrapping(strategy: Strategy) -> bool:
    """``True`` if a strategy loads a checkpoint after it has wrapped the model.

    Without it such a strategy of a third party is not refused, and fails when it resumes.
    """
    return strategy.restore_checkpoint_after_setup


def implements_forward(pl_module: LightningModule) -> bool:
    """``True`` if the module has a ``forward`` of its own.

    Without it, only the export at the end of training notices a module that has none.
    """
    return is_overridden("forward", pl_module, LightningModule)


def is_fitting(trainer: Trainer) -> bool:
    """``True`` while ``trainer.fit`` runs, in any of its stages.

    Without it, validation inside ``fit`` looks like ``trainer.validate``, for which quantization
    is turned off if the model has no ranges.
    """
    return trainer.state.fn == "fit"


def configuration_error(message: str) -> Exception:
    """The exception that Lightning itself raises for a wrong setup, to be raised by the caller.

    Without it ``ValueError`` would do; users who catch Lightning's exception would miss ours.
    """
    return MisconfigurationException(message)
