"""Load QAT checkpoints without a callback, and turn them into float checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
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
from lightning_qat.recipe.recipe import Recipe

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
            of a newer format or without some of its quantizers; or the file holds objects that
            torch does not load unless ``weights_only=False`` says that it is trusted.
        RuntimeError: The checkpoint's weights do not fit the module.
    """
    return _loaded(cls, path, kwargs, float_too=False)


def load_float_or_qat_checkpoint(cls: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """As ``load_qat_checkpoint``, and a checkpoint of a float model as Lightning loads it."""
    return _loaded(cls, path, kwargs, float_too=True)


def _loaded(
    cls: type[_Module], path: str | Path, kwargs: Mapping[str, Any], *, float_too: bool
) -> _Module:
    if not hasattr(cls, "load_from_checkpoint"):
        raise TypeError(
            f"load_qat_checkpoint takes a LightningModule class; got {cls!r}. For a plain module "
            "call prepare(model, recipe) and model.load_state_dict(...)."
        )
    _require_torchs_format(path)
    loading: Any = cls
    try:
        with _prepared_on_load(loading, float_too=float_too):
            return cast(_Module, loading.load_from_checkpoint(path, **kwargs))
    except FileNotFoundError:
        raise
    except (EOFError, OSError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise _unreadable(path, error) from error


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> Mapping[str, Any]:
    """The content of a checkpoint; its tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no whole checkpoint of a QAT run, or holds objects that torch does
            not load unless ``weights_only=False`` says that it is trusted.
    """
    _require_torchs_format(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, Mapping) or not is_quantized(checkpoint.get("state_dict", {})):
        raise ValueError(
            f"{str(path)!r} must be a Lightning checkpoint of a QAT run; it holds no quantizers."
        )
    return checkpoint


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    """What to say where torch refuses a file."""
    if "Unsupported global" in str(error):
        what = str(error).partition("GLOBAL ")[2].partition(" was")[0]
        return ValueError(
            f"{str(path)!r} must hold tensors and plain values; it holds {what}, such as a "
            "hyperparameter of that class, and loading it runs code from the file. If you trust "
            "the file, pass weights_only=False."
        )
    return ValueError(
        f"{str(path)!r} must be a whole checkpoint; torch could not read it: {error}. It was cut "
        "off or damaged; use an earlier one."
    )


def stored_recipe(path: str | Path, *, weights_only: bool = True) -> Recipe | None:
    """The recipe that a checkpoint was trained with; ``None``: it does not say.

    Args:
        path: A checkpoint that ``load_qat_checkpoint`` loads.
        weights_only: As for ``torch.load``.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    recipe = checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {}).get("recipe")
    return None if recipe is None else Recipe.from_dict(recipe)


def _require_torchs_format(path: str | Path) -> None:
    """Refuse a file that is no zip archive, at which torch's reader may fail in any way."""
    file = Path(path)
    if file.is_file():
        with file.open("rb") as opened:
            start = opened.read(2)
        if start != b"PK":
            raise ValueError(
                f"{str(path)!r} must be a whole checkpoint, as torch.save writes it; it is empty "
                "or something else."
            )


@contextmanager
def _prepared_on_load(cls: Any, *, float_too: bool) -> Iterator[None]:
    """For a while, every module of a class gets its QAT layers before its weights are loaded.

    on_load_checkpoint is the one hook in between. A subclass with a hook would not do: LightningCLI
    writes the name of the class into checkpoints, and that very class is made again.
    """
    of_class, inherited = vars(cls).get("on_load_checkpoint"), cls.on_load_checkpoint

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        inherited(self, checkpoint)
        if float_too and not is_quantized(checkpoint["state_dict"]):
            return
        newer = version_problem(checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {}))
        if newer is not None:
            raise ValueError(newer)
        prepare_like(self, checkpoint["state_dict"])
        missing = missing_problem(checkpoint["state_dict"], self)
        if missing is not None:
            raise ValueError(missing)

    cls.on_load_checkpoint = on_load_checkpoint
    try:
        yield
    finally:
        if of_class is None:
            del cls.on_load_checkpoint
        else:
            cls.on_load_checkpoint = of_class


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
