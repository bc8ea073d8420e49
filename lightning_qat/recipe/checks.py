"""Checks of values that a user has written; each returns messages without a full stop."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeGuard

from lightning_qat.recipe.suggest import closest_names


def is_int(value: object) -> TypeGuard[int]:
    """``True`` for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def key_problems(where: str, values: object, known: Collection[str]) -> list[str]:
    """A message for each key that is not known, or one if ``values`` is no mapping.

    Example:
        >>> key_problems("config", {"bit": 8}, ("bits", "clip"))
        ["config has no key 'bit'; closest names: 'bits'"]
    """
    if not isinstance(values, Mapping):
        return [f"{where} must be a mapping; got {values!r}"]
    return [
        f"{where} has no key {key!r}; {closest_names(str(key), known)}"
        for key in values
        if key not in known
    ]


def choice_problem(where: str, value: object, choices: Collection[str]) -> str | None:
    """A message if a value is not among its choices."""
    if value in tuple(choices):  # not by hash: YAML may give a list
        return None
    return f"{where} must be one of {list(choices)}; got {value!r}"


def flag_problem(where: str, value: object, or_else: str | None = None) -> str | None:
    """A message if a value is neither ``True`` nor ``False``, nor the one word that is allowed."""
    if isinstance(value, bool) or (isinstance(value, str) and value == or_else):
        return None
    choices = "true or false" if or_else is None else f"true, false or {or_else!r}"
    return f"{where} must be {choices}; got {value!r}"


def refuse(*problems: str | None) -> None:
    """Raise if there are problems; all are told, so that one look at a file mends it.

    Raises:
        ValueError: A line for each message, with a full stop.

    Example:
        >>> refuse(None, "bits must be an int", "clip must be a pair")
        Traceback (most recent call last):
        ...
        ValueError: bits must be an int.
        clip must be a pair.
    """
    told = dict.fromkeys(problem for problem in problems if problem is not None)
    if told:
        raise ValueError("\n".join(f"{problem.removesuffix('.')}." for problem in told))
