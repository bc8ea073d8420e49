"""Load QAT checkpoints where no callback is at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from lightning_qat.prepare import prepare_like

_Module = TypeVar("_Module", bound=nn.Module)


def load_qat_checkpoint(cls: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """Load a checkpoint of a QAT run into a new module with the QAT layers it was trained with.

    ``cls.load_from_checkpoint`` does the work, so hyperparameters are restored as usual; which
    layers are quantized, and how, is read from the checkpoint's own state_dict (checkpoints with
    ``save_weights_only=True`` included).

    Args:
        cls: The LightningModule class that was trained.
        path: The checkpoint.
        **kwargs: Passed on to ``cls.load_from_checkpoint``.

    Returns:
        A ``cls`` ready for ``convert``, evaluation or further training.

    Raises:
        TypeError: ``cls`` has no ``load_from_checkpoint``.
        ValueError: The checkpoint is of a float model, or of another network.
        RuntimeError: The checkpoint's weights do not fit the module.
    """
    if not hasattr(cls, "load_from_checkpoint"):
        raise TypeError(
            f"load_qat_checkpoint takes a LightningModule class; got {cls!r}. For a plain module "
            "call prepare(model, recipe) and model.load_state_dict(...)."
        )

    # A subclass for the moment: on_load_checkpoint is the one hook before the weights are loaded.
    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        super(loading, self).on_load_checkpoint(checkpoint)
        prepare_like(self, checkpoint["state_dict"])

    body = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__}
    loading: Any = type(cls.__name__, (cls,), body)
    module = loading.load_from_checkpoint(path, **kwargs)
    module.__class__ = cls
    return cast(_Module, module)
