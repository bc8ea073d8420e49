"""JSON as plain data: every key once, numbers of at most 64 bits, a bounded depth."""

from __future__ import annotations

import json
from typing import Any

from lightning_qat.plain_data.limits import levels_problem, value_problem


def parse_json(text: str) -> object:
    """Read JSON.

    Args:
        text: One value; ``NaN`` and ``Infinity`` are numbers, as Python writes them.

    Returns:
        Mappings, lists, texts, numbers, flags and ``None``.

    Raises:
        ValueError: It is no JSON, a key comes twice in its object, or it goes beyond the limits.

    Example:
        >>> parse_json('{"weight": {"bits": 4}}')
        {'weight': {'bits': 4}}
    """
    try:
        values: object = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(levels_problem()) from None
    problem = value_problem(values)
    if problem is not None:
        raise ValueError(problem)
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = sorted({name for name, _ in pairs if name in seen or seen.add(name)})  # type: ignore[func-returns-value]
        raise ValueError(f"a key must come once in its object; {twice} come more often")
    return values
