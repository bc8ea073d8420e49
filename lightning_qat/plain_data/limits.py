"""How deep, how many and how long plain data may be: more is an attack, or no file of this kind."""

from __future__ import annotations

from collections.abc import Mapping

MOST_LEVELS = 50
"""Lists and mappings inside each other."""

MOST_VALUES = 300_000
"""Values in all, those of an alias counted wherever it stands."""

MOST_CHARACTERS = 16 * 2**20
"""Characters of all texts in all, those of an alias counted wherever it stands."""

_INTEGERS = 2**63


def integer_problem(value: int) -> str | None:
    """A message if a whole number has more than 64 bits, without writing it out."""
    if -_INTEGERS <= value < _INTEGERS:
        return None
    return f"a whole number must have at most 64 bits; one has {value.bit_length():,}"


def value_problem(values: object) -> str | None:
    """A message if data that a parser has made go beyond the limits; nothing calls itself here.

    Example:
        >>> value_problem([[8]]), value_problem([2**64])
        (None, 'a whole number must have at most 64 bits; one has 65')
    """
    level, seen = [values], 0
    for depth in range(MOST_LEVELS + 2):
        if not level:
            return None
        if depth > MOST_LEVELS:
            break
        seen += len(level)
        if seen > MOST_VALUES:
            return f"data must have at most {MOST_VALUES:,} values; they have more"
        inner: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, int):
                problem = integer_problem(value)
                if problem is not None:
                    return problem
        level = inner
    return levels_problem()


def levels_problem() -> str:
    """The message about data that are nested too deep."""
    return f"data must be nested at most {MOST_LEVELS} deep; they are deeper"
