"""Checks of values that a user has written; each returns messages without a full stop."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable, Mapping
from numbers import Real
from typing import TypeGuard

from lightning_qat.recipe.suggest import closest_names


def is_int(value: object) -> TypeGuard[int]:
    """``True`` for an int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


_MOST_TOLD = 20
"""So many problems of one kind are told."""

_MOST_LINES = 100

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlong = 40


def is_number(value: object) -> TypeGuard[float]:
    """``True`` for a real number, NumPy's as well, that is no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def shown(value: object) -> str:
    """A value as Python writes it, shortened where it is long.

    Example:
        >>> shown([1, 2]), len(shown("x" * 10**6))
        ('[1, 2]', 120)
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"{type(value).__name__} of very many digits"


def pattern_problems(where: str, patterns: object) -> list[str]:
    """Messages if a value is no list of patterns.

    Example:
        >>> pattern_problems("exclude", ["head", 3])
        ['exclude must be a list of texts; one is 3. Write it in quotes']
    """
    if isinstance(patterns, str):
        short = shown(patterns)
        name = where.rpartition(".")[2]
        return [
            f"{where} must be a list of patterns; got the string {short}. Write {name}=[{short}]"
        ]
    if not isinstance(patterns, Iterable) or isinstance(patterns, Mapping | bytes):
        return [f"{where} must be a list of patterns; got {shown(patterns)}"]
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str)]
    return [
        f"{where} must be a list of texts; one is {shown(one)}. Write it in quotes"
        for one in wrong[:_MOST_TOLD]
    ]


def key_problems(where: str, values: object, known: Collection[str]) -> list[str]:
    """A message for each key that is not known, or one if ``values`` is no mapping.

    Example:
        >>> key_problems("config", {"bit": 8}, ("bits", "clip"))
        ["config has no key 'bit'; closest names: 'bits'"]
    """
    if not isinstance(values, Mapping):
        return [f"{where} must be a mapping; got {shown(values)}"]
    unknown = [key for key in values if key not in known]
    problems = [
        f"{where} has no key {shown(key)}; {closest_names(str(key)[:120], known)}"
        for key in unknown[:_MOST_TOLD]
    ]
    if len(unknown) > _MOST_TOLD:
        problems.append(f"{where} has {len(unknown) - _MOST_TOLD} more keys that are not known")
    return problems


def choice_problem(where: str, value: object, choices: Collection[str]) -> str | None:
    """A message if a value is not among its choices."""
    if value in tuple(choices):  # not by hash: YAML may give a list
        return None
    return f"{where} must be one of {list(choices)}; got {shown(value)}"


def flag_problem(where: str, value: object, or_else: str | None = None) -> str | None:
    """A message if a value is neither ``True`` nor ``False``, nor the one word that is allowed."""
    if isinstance(value, bool) or (isinstance(value, str) and value == or_else):
        return None
    choices = "true or false" if or_else is None else f"true, false or {or_else!r}"
    return f"{where} must be {choices}; got {shown(value)}"


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


def first_lines(text: str) -> str:
    """The first lines of a message, and how many there are more."""
    lines = text.splitlines()
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"There are {len(lines) - _MOST_LINES} more problems."]
    return "\n".join(lines)
