"""Which layers a pattern of a recipe selects, and which overrides contradict each other."""

from __future__ import annotations

import fnmatch
import glob
from collections.abc import Mapping, Sequence

from lightning_qat.recipe_keys import LayerKeys


def is_type(pattern: str) -> bool:
    """Whether a pattern is of float classes, ``type:Linear``; otherwise it is of names."""
    return pattern.startswith("type:")


def selects(pattern: str, name: str, kind: str) -> bool:
    """Whether a pattern selects the layer ``name`` of float class ``kind``."""
    if is_type(pattern):
        return fnmatch.fnmatchcase(kind, pattern.removeprefix("type:"))
    parts = name.split(".")
    prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(fnmatch.fnmatchcase(prefix, pattern) for prefix in prefixes)


def contradictions(
    overrides: Mapping[str, LayerKeys | None], exclude: Sequence[str], layers: Mapping[str, str]
) -> list[str]:
    """What is wrong with overrides that cannot all be meant; see ``Recipe.check_patterns``.

    Args:
        overrides: As in ``Recipe``.
        exclude: As in ``Recipe``.
        layers: Dotted name to float class name of every layer of the model.

    Returns:
        One sentence for every contradiction.
    """
    selected = {
        pattern: {name for name, kind in layers.items() if selects(pattern, name, kind)}
        for pattern in (*overrides, *exclude)
    }
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
        for pattern, change in reversed(list(overrides.items())):
            if name not in selected[pattern] or name in excluded:
                continue
            for key, value in _settings(change).items():
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
    """What an override sets, one by one; that the layer is quantized at all is one of them."""
    settings: dict[str, object] = {"quantization": change is not None}
    for half, keys in (change or {}).items():
        if isinstance(keys, Mapping):
            settings |= {f"{half}.{key}": value for key, value in keys.items()}
    return settings
