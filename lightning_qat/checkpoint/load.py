"""Load QAT checkpoints without a callback, and turn them into float checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
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
from lightning_qat.checkpoint.shape import shape_problem
from lightning_qat.prepare.prepare_like import prepare_like
from lightning_qat.quantizers.names import PLAN
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.torch_files.load import load_saved

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
        FileNotFoundError: There is no such file.
        ValueError: The file is none of a checkpoint, is cut off or damaged, lacks a part, is of a
            float model, of another network, of a newer format or without some of its quantizers;
            or ``cls`` cannot be made of its hyperparameters and ``kwargs``; or it is whole and
            holds objects, such as a hyperparameter that is a dataclass: torch loads these when
            ``weights_only=False`` says that the file is trusted, or when
            ``torch.serialization.add_safe_globals`` has their classes. The message says which.
        RuntimeError: The checkpoint's weights do not fit the module.
    """
    return _loaded(cls, path, kwargs, float_too=False)


def load_float_or_qat_checkpoint(cls: type[_Module], path: str | Path, **kwargs: Any) -> _Module:
    """As ``load_qat_checkpoint``, and a checkpoint of a float model as Lightning loads it."""
    return _loaded(cls, path, kwargs, float_too=True)


class NotMadeError(ValueError):
    """A class cannot be made of what a checkpoint and the caller give its constructor."""


def _loaded(
    cls: type[_Module], path: str | Path, kwargs: Mapping[str, Any], *, float_too: bool
) -> _Module:
    if not hasattr(cls, "load_from_checkpoint"):
        raise TypeError(
            f"load_qat_checkpoint takes a LightningModule class; got {cls!r}. For a plain module "
            "call prepare(model, recipe) and model.load_state_dict(...)."
        )
    weights_only = kwargs.get("weights_only") is not False
    checkpoint = _whole_checkpoint(path, weights_only=weights_only)
    loading: Any = cls
    options = dict(kwargs)
    if "weights_only" in signature(loading.load_from_checkpoint).parameters:
        options["weights_only"] = weights_only
    else:
        # Lightning before 2.6 has no such argument, and trusts every file: this one was looked at.
        options.pop("weights_only", None)
    try:
        with _prepared_on_load(loading, float_too=float_too):
            return cast(_Module, loading.load_from_checkpoint(path, **options))
    except (ValueError, RuntimeError, OSError, MemoryError, Warning):
        raise
    except Exception as error:  # the user's constructor runs in it
        stored = sorted(map(str, checkpoint.get("hyper_parameters", {})))
        raise NotMadeError(
            f"{cls.__name__} cannot be made of what {str(path)!r} holds: {type(error).__name__}: "
            f"{error}. It holds the hyperparameters {stored}. Pass what is missing or shall be "
            f"another: load_qat_checkpoint({cls.__name__}, path, name=value)."
        ) from error


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> Mapping[str, Any]:
    """The content of a checkpoint; its tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no whole checkpoint of a QAT run, or holds objects that torch does
            not load unless ``weights_only=False`` says that it is trusted.
    """
    checkpoint = _whole_checkpoint(path, weights_only=weights_only)
    if not is_quantized(checkpoint["state_dict"]):
        raise ValueError(
            f"{str(path)!r} must be a Lightning checkpoint of a QAT run; it holds no quantizers."
        )
    return checkpoint


def _whole_checkpoint(path: str | Path, *, weights_only: bool) -> Mapping[str, Any]:
    checkpoint = load_saved(path, weights_only=weights_only)
    problem = shape_problem(checkpoint)
    if problem is not None:
        raise ValueError(f"{str(path)!r}: {problem}")
    return cast(Mapping[str, Any], checkpoint)


def stored_recipe(path: str | Path, *, weights_only: bool = True) -> Recipe | None:
    """The recipe that a checkpoint was trained with; ``None``: it does not say.

    Args:
        path: A checkpoint that ``load_qat_checkpoint`` loads.
        weights_only: As for ``torch.load``.
    """
    checkpoint = read_checkpoint(path, weights_only=weights_only)
    recipe = checkpoint.get("callbacks", {}).get(CALLBACK_KEY, {}).get("recipe")
    return None if recipe is None else Recipe.from_dict(recipe)


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
        missing = _prepared(self, checkpoint["state_dict"])
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


def _prepared(module: nn.Module, state_dict: Mapping[str, Any]) -> str | None:
    """Give a module the QAT layers of a state_dict; a message if the rest of it is not there."""
    try:
        prepare_like(module, state_dict)
        return missing_problem(state_dict, module)
    except ValueError:
        raise
    except Exception as error:  # specs and plan are read as they were written
        raise ValueError(
            "The state_dict must hold the specs of its quantizers and the plan of its tensors as "
            f"they were saved; {type(error).__name__}: {error}. It was edited, or is of another "
            "version; use the one that training wrote."
        ) from error


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
