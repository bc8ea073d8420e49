"""The user's module and data that a command names: a class and its constructor's arguments."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from lightning_qat.plain_data.shape import as_shape
from lightning_qat.plain_data.text import read_text
from lightning_qat.recipe.checks import shown


def imported_class(path: str, option: str = "--module") -> type[Any]:
    """A class by its dotted path, found as ``python -m`` finds it: in the current folder first.

    Args:
        path: Package, file and class with dots between them.
        option: What named it, for errors.

    Raises:
        ValueError: It cannot be imported, or is no class.
    """
    from lightning_qat.recipe.suggest import closest_names

    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module_path, _, name = path.rpartition(".")
    if not module_path:
        raise ValueError(
            f"{option} must be a dotted path such as package.file.Class; got {path!r}."
        )
    try:
        module = import_module(module_path)
    except Exception as error:  # the user's code runs here
        raise ValueError(
            f"{option} {path!r} cannot be imported: {type(error).__name__}: {error}. Run the "
            "command where training runs, and name the class as training imports it."
        ) from error
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [n for n, value in vars(module).items() if isinstance(value, type)]
        raise ValueError(
            f"{option} must name a class; {module_path!r} has no class {name!r}; "
            f"{closest_names(name, classes)}."
        )
    return found


def plain_arguments(source: str) -> dict[str, Any]:
    """Arguments by name, from JSON or YAML, or from a file of them.

    Raises:
        ValueError: It is no mapping.
    """
    path = Path(source)
    is_file = path.suffix in (".json", ".yaml", ".yml")
    values = _parsed(read_text(path) if is_file else source, source)
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(
            f"--init-args must be a mapping, such as '{{\"width\": 8}}', or a .json or .yaml file "
            f"with one; got {shown(source)}."
        )
    return values


class LightningConfig:
    """What a configuration file of LightningCLI says of the module, its data and quantization.

    Args:
        path: The ``config.yaml`` that LightningCLI wrote beside the logs, or was given.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such configuration.
    """

    def __init__(self, path: Path) -> None:
        values = _parsed(read_text(path), str(path))
        # One file may hold the subcommands' configurations.
        if isinstance(values, Mapping) and isinstance(values.get("fit"), Mapping):
            values = values["fit"]
        if not isinstance(values, Mapping) or not isinstance(values.get("model"), Mapping):
            raise ValueError(
                f"{str(path)!r} must be a configuration of LightningCLI, with the key 'model'."
            )
        said = as_shape(values, _Said, str(path))
        self._path, self._model = path, said["model"]
        self._data = said.get("data") or {}
        self._callbacks = (said.get("trainer") or {}).get("callbacks")

    @property
    def class_path(self) -> str | None:
        """The module's class; ``None``: the script that runs LightningCLI names it."""
        return self._model.get("class_path")

    @property
    def data_class_path(self) -> str | None:
        """The data module's class; ``None``: the script names it, or there is none."""
        return self._data.get("class_path")

    def arguments(self, cls: type[Any]) -> dict[str, Any]:
        """The arguments of the module's constructor, objects among them made.

        Raises:
            ImportError: jsonargparse is missing.
            ValueError: They do not fit the class.
        """
        return self._arguments("model", self._model, cls)

    def data_arguments(self, cls: type[Any]) -> dict[str, Any]:
        """The arguments of the data module's constructor, objects among them made.

        Raises:
            ImportError: jsonargparse is missing.
            ValueError: They do not fit the class.
        """
        return self._arguments("data", self._data, cls)

    def _arguments(self, key: str, section: _Made, cls: type[Any]) -> dict[str, Any]:
        given: Mapping[str, Any] = section
        if "class_path" in section:
            given = section.get("init_args") or {}
        if not given:
            return {}
        try:
            import jsonargparse
        except ImportError as error:
            raise ImportError(
                "--config needs jsonargparse, as LightningCLI does: pip install "
                "'lightning-qat[cli]'."
            ) from error
        parser: Any = jsonargparse.ArgumentParser(exit_on_error=False)
        try:
            parser.add_class_arguments(cls, key, instantiate=False, fail_untyped=False)
            parsed = parser.parse_object({key: dict(given)})
            made = parser.instantiate(parsed)[key]
            return {name: made[name] for name in given}
        except Exception as error:  # jsonargparse's, and those of classes that it makes
            raise ValueError(
                f"The {key} of {str(self._path)!r} does not fit {cls.__name__}: {error}"
            ) from error

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The arguments of its ``QATCallback``; empty: it has none."""
        callbacks = self._callbacks
        for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
            # One without arguments may be a name alone.
            if isinstance(callback, dict):
                if (callback.get("class_path") or "").rpartition(".")[2] == "QATCallback":
                    return dict(callback.get("init_args") or {})
        return {}


class _Made(TypedDict, total=False):
    """An object that the configuration makes; without ``class_path`` its keys are arguments."""

    class_path: str | None
    init_args: dict[str, object] | None


class _Trainer(TypedDict, total=False):
    callbacks: list[_Made | str] | _Made | str | bool | None


class _SaidOrNot(TypedDict, total=False):
    data: _Made | None
    trainer: _Trainer | None


class _Said(_SaidOrNot):
    """What is read of a configuration."""

    model: _Made


def _parsed(text: str, source: str) -> Any:
    from lightning_qat.plain_data.parse_yaml import parse_yaml

    try:
        # Arguments may be mappings with numbers as keys.
        return parse_yaml(text, names_only=False)
    except ValueError as error:
        raise ValueError(f"{shown(source)} is neither JSON nor YAML: {error}") from error
