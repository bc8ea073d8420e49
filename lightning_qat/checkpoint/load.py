"""Load QAT checkpoints without a callback, and turn them into float checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn

from lightning_qat.checkpoint.contents import (
    CALLBACK_KEY,
    is_quantized,
    missing_problem,
    quantizer_prefixes,
    version_problem,
)
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.quantizers.names import PLAN

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
        ValueError: The file is no whole checkpoint, or one of a float model, of another network,
            of a newer format or without some of its quantizers.
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
        newer = version_problem(checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {}))
        if newer is not None:
            raise ValueError(newer)
        prepare_like(self, checkpoint["state_dict"])
        missing = missing_problem(checkpoint["state_dict"], self)
        if missing is not None:
            raise ValueError(missing)

    body = {"on_load_checkpoint": on_load_checkpoint, "__module__": cls.__module__}
    loading: Any = type(cls.__name__, (cls,), body)
    try:
        module = loading.load_from_checkpoint(path, **kwargs)
    except FileNotFoundError:
        raise
    except (EOFError, OSError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ValueError(
            f"{str(path)!r} must be a whole checkpoint; torch could not read it: {error}. It was "
            "cut off or damaged; use an earlier one."
        ) from error
    module.__class__ = cls
    return cast(_Module, module)


def strip_quantizers(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A plain float checkpoint from a QAT one: the trained weights, nothing of quantization.

    The result loads wherever a checkpoint of the float module does, optimizer and loops included.
    Nothing is rounded: the weights are the float ones that QAT trains.

    Args:
        checkpoint: The result of ``torch.load``; it is not changed.

    Returns:
        A new checkpoint that shares its tensors, to be saved with ``torch.save``.

    Raises:
        ValueError: It holds no quantizers.

    Example::

        torch.save(strip_quantizers(torch.load("qat.ckpt")), "float.ckpt")
    """
    if "state_dict" not in checkpoint or not is_quantized(checkpoint["state_dict"]):
        raise ValueError(
            "strip_quantizers takes a Lightning checkpoint of a QAT run; this one holds no "
            "quantizers, so there is nothing to strip."
        )
    stripped = dict(checkpoint)
    # WeightAveraging keeps a second set of weights.
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            weights = checkpoint[key]
            gone = quantizer_prefixes(weights)
            stripped[key] = {
                name: value
                for name, value in weights.items()
                if name != PLAN and not name.startswith(gone)
            }
    if "callbacks" in checkpoint:
        others = checkpoint["callbacks"].items()
        stripped["callbacks"] = {key: state for key, state in others if key != CALLBACK_KEY}
    return stripped
