"""The user's module with the weights of a checkpoint, as a command's options name both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_qat.cli.console import say
from lightning_qat.cli.module_class import LightningConfig, imported_class, plain_arguments

if TYPE_CHECKING:
    from lightning_qat.recipe.recipe import Recipe


def require_checkpoint(path: Path, or_else: str = "") -> None:
    """Refuse what is no file.

    Args:
        path: The checkpoint.
        or_else: What else it may be, for the message.

    Raises:
        ValueError: It is a folder.
        FileNotFoundError: There is nothing.
    """
    if path.is_dir():
        raise ValueError(
            f"{str(path)!r} is a folder, as sharded strategies write checkpoints. Make one file of "
            "it: python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"There must be a checkpoint{or_else} at {str(path)!r}; no file is there."
        )


def module_class(path: Path, named: str | None, config: LightningConfig | None) -> type[Any]:
    """The class of the module: ``--module``, or the configuration's.

    Raises:
        ValueError: Neither names one, or it cannot be imported.
    """
    class_path = named or (config.class_path if config else None)
    if class_path is None:
        raise ValueError(
            f"{str(path)!r} is a checkpoint, whose module must be named: --module "
            "package.file.Class, or --config with a class_path under model."
        )
    return imported_class(class_path)


def trained_module(
    cls: type[Any],
    path: Path,
    load: Callable[..., Any],
    *,
    init_args: str | None,
    config: LightningConfig | None,
    trust: bool,
) -> Any:
    """The module with a checkpoint's weights.

    Args:
        cls: Its class.
        path: The checkpoint.
        load: A function of ``lightning_qat.checkpoint.load``.
        init_args: Arguments of the constructor, above those of the configuration.
        config: LightningCLI's configuration.
        trust: Load objects other than tensors and plain values.

    Raises:
        ValueError: They do not fit each other, or the constructor fails.
    """
    arguments: dict[str, Any] = config.arguments(cls) if config else {}
    if init_args is not None:
        arguments |= plain_arguments(init_args)
    say(f"loading {path}")
    from lightning_qat.checkpoint.load import NotMadeError

    try:
        return load(cls, path, map_location="cpu", weights_only=not trust, **arguments)
    except NotMadeError as error:
        raise _not_made(cls, path, error.__cause__ or error) from error
    except (ValueError, OSError) as error:
        raise of_command(error) from error
    except Exception as error:  # the weights do not fit
        raise _not_made(cls, path, error) from error


def _not_made(cls: type[Any], path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"{cls.__name__} cannot be made and loaded from {str(path)!r}: "
        f"{type(error).__name__}: {error}. Arguments of its constructor that the checkpoint "
        "does not hold are given by --init-args '{\"name\": value}' or --config."
    )


def recipe_of(path: Path, *, trust: bool) -> Recipe | None:
    """The recipe that a checkpoint of a QAT run was trained with; ``None``: it does not say."""
    from lightning_qat.checkpoint.load import stored_recipe

    try:
        return stored_recipe(path, weights_only=not trust)
    except (ValueError, OSError) as error:
        raise of_command(error) from error


def of_command(error: Exception) -> ValueError:
    """The message of a function of the package, with the option in the place of the argument."""
    text = str(error).replace("pass weights_only=False", "add --trust")
    # A program can name classes before; a command cannot.
    return ValueError(text.partition(" If you trust these classes")[0])
