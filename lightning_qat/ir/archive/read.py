"""Read a ``.pt2`` file of a converted model: its program, and what is written beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from lightning_qat.ir.archive.check import check_archive
from lightning_qat.ir.recurrence import GATES, Recurrence
from lightning_qat.model.torch_private import load_program

FORMAT_VERSION = 1
EXTRA_FILE = "lightning_qat.json"
_LONGEST = 400


class NewerFormatError(ValueError):
    """A file of a later version of lightning-qat."""


@dataclass(frozen=True)
class Facts:
    """What ``QuantizedModel.save`` writes beside the program; ``None``: an earlier version's."""

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    recipe: Mapping[str, Any]
    recurrences: tuple[Recurrence, ...] | None
    unreached: tuple[str, ...]
    constant_layers: tuple[str, ...]


def read_archive(path: Path, *, trust: bool) -> tuple[ExportedProgram, Facts]:
    """The program of a file, and the facts beside it.

    Args:
        path: The file.
        trust: Leave the check out.

    Raises:
        NewerFormatError: It is of a newer format.
        ValueError: It is no such file, or its facts are none.
        Exception: Of many kinds, where torch cannot make a program of it.
    """
    with path.open("rb") as file:
        # One open file for the check and for torch: what was looked at is what is loaded.
        if not trust:
            check_archive(file)
        program, text = load_program(file, EXTRA_FILE)
    if not text:
        raise ValueError(f"it holds no {EXTRA_FILE}")
    return program, _facts(text, path)


def told(error: BaseException) -> str:
    """An error in one line."""
    line = str(error).strip().partition("\n")[0][:_LONGEST]
    return line if type(error) is ValueError else f"{type(error).__name__}: {line}"


def _facts(text: str, path: Path) -> Facts:
    try:
        facts = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{EXTRA_FILE} is nested too deep") from error
    if not isinstance(facts, dict) or type(facts.get("format_version")) is not int:
        raise ValueError(f"{EXTRA_FILE} must hold a table with a format_version")
    if facts["format_version"] > FORMAT_VERSION:
        raise NewerFormatError(
            f"{str(path)!r} has format version {facts['format_version']}; this version of "
            f"lightning-qat reads up to {FORMAT_VERSION}. Upgrade lightning-qat."
        )
    recipe = facts.get("recipe", {})
    if not isinstance(recipe, dict):
        raise ValueError(f"{EXTRA_FILE}: 'recipe' must be a table; got {recipe!r}")
    return Facts(
        _texts(facts, "input_names"),
        _texts(facts, "output_names"),
        recipe,
        _recurrences(facts["recurrences"]) if "recurrences" in facts else None,
        _texts(facts, "unreached", ()),
        _texts(facts, "constant_layers", ()),
    )


def _texts(facts: Mapping[str, Any], key: str, default: Any = None) -> tuple[str, ...]:
    texts = facts.get(key, default)
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{EXTRA_FILE}: {key!r} must be a list of names; got {texts!r}")
    return tuple(texts)


def _recurrences(listed: Any) -> tuple[Recurrence, ...]:
    found = []
    for entry in listed if isinstance(listed, list) else [None]:
        match entry:
            case {"name": str(name), "kind": "LSTM" | "GRU" as kind, "initial_cells": cells}:
                cells = _texts({"initial_cells": cells}, "initial_cells")
                found.append(Recurrence(name, kind, cells))
            case _:
                raise ValueError(
                    f"{EXTRA_FILE}: 'recurrences' must list layers with a name, initial cells and "
                    f"a kind, one of {[*GATES]}; got {entry!r}"
                )
    return tuple(found)
