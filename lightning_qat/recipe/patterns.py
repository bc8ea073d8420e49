"""Which layers a pattern of a recipe selects, and which overrides contradict each other."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Mapping, Sequence
from functools import lru_cache

from lightning_qat.recipe.typed_dicts import LayerKeys

_WILDCARDS = frozenset("*?[")


def is_type(pattern: str) -> bool:
    """``True`` for a pattern of float classes, ``type:Linear``; others are patterns of names."""
    return pattern.startswith("type:")


def selects(pattern: str, name: str, kind: str) -> bool:
    """``True`` if a pattern selects the layer ``name`` of float class ``kind``."""
    if is_type(pattern):
        return fnmatch.fnmatchcase(kind, pattern.removeprefix("type:"))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes(name))


def prefixes(name: str) -> list[str]:
    """The name and those of the modules around it.

    Example:
        >>> prefixes("net.0.conv")
        ['net', 'net.0', 'net.0.conv']
    """
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


class Patterns:
    """Patterns in the order given; plain names are looked up, however many there are."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._order = {pattern: number for number, pattern in enumerate(patterns)}
        self.names = {p for p in patterns if not (is_type(p) or set(p) & _WILDCARDS)}
        self._others = [p for p in patterns if p not in self.names]

    def selecting(self, names: tuple[str, ...], kind: str) -> list[str]:
        """Those that select a layer with these names."""
        found = self.names & {prefix for name in names for prefix in prefixes(name)}
        found |= {p for p in self._others if any(selects(p, name, kind) for name in names)}
        return sorted(found, key=self._order.__getitem__)


indexed = lru_cache(maxsize=16)(Patterns)
"""``Patterns``, made once."""


def contradictions(
    overrides: Mapping[str, LayerKeys | None], exclude: Sequence[str], layers: Mapping[str, str]
) -> list[str]:
    """Find overrides that contradict each other or ``exclude``; see ``Recipe.check_patterns``.

    Args:
        overrides: As in ``Recipe``.
        exclude: As in ``Recipe``.
        layers: Dotted name to float class name of every layer of the model.

    Returns:
        One sentence for every contradiction.
    """
    index = indexed((*overrides, *exclude))
    selecting = {name: index.selecting((name,), kind) for name, kind in layers.items()}
    selected: dict[str, set[str]] = {pattern: set() for pattern in (*overrides, *exclude)}
    for name, patterns in selecting.items():
        for pattern in patterns:
            selected[pattern].add(name)
    excluded: set[str] = set().union(*(selected[pattern] for pattern in exclude))
    problems = []
    for pattern, change in overrides.items():
        mine = selected[pattern]
        if change is not None and mine and mine <= excluded:
            name = min(mine)
            other = next(p for p in exclude if name in selected[p])
            problems.append(
                f"Recipe.exclude keeps float what Recipe.overrides[{pattern!r}] changes: "
                f"{other!r} in exclude selects {name!r}. Drop one of the two."
            )
    found: dict[tuple[str, str, str], str] = {}
    for name in layers:
        decided: dict[tuple[bool, str], tuple[str, object]] = {}
        if name in excluded:
            continue
        for pattern in reversed([p for p in selecting[name] if p in overrides]):
            for key, value in _settings(overrides[pattern]).items():
                later, wins = decided.setdefault((is_type(pattern), key), (pattern, value))
                narrower = later in (name, glob.escape(name)) or selected[later] < selected[pattern]
                if value != wins and not narrower:
                    found.setdefault((pattern, later, key), name)
    return problems + [
        f"Recipe.overrides[{earlier!r}] and Recipe.overrides[{later!r}] contradict each other in "
        f"{key} of {name!r}; the later of two must be the narrower one. Put the narrower one last, "
        f"or name the layer itself after both: overrides[{name!r}]."
        for (earlier, later, key), name in found.items()
    ]


def _settings(change: LayerKeys | None) -> dict[str, object]:
    """The settings of an override, flat; whether the layer is quantized at all is one of them."""
    settings: dict[str, object] = {"quantization": change is not None}
    for half, keys in (change or {}).items():
        if isinstance(keys, Mapping):
            settings |= {f"{half}.{key}": value for key, value in keys.items()}
    return settings
