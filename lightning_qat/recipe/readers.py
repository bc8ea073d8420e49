"""Recipe files: YAML, JSON and AMCT's cfg."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from lightning_qat.recipe.amct_config import cfg_recipe, is_json_config, json_recipe


def _read_cfg(text: str) -> Mapping[str, Any]:
    # Here, because protobuf takes longer to import than the rest of this module.
    from lightning_qat.recipe.amct_cfg import parse_cfg

    return cfg_recipe(parse_cfg(text))


def _read_json(text: str) -> object:
    values = json.loads(text, object_pairs_hook=_unique_keys)
    return json_recipe(values) if isinstance(values, dict) and is_json_config(values) else values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"a key must come once in its object; {twice} come more often")
    return values


READERS: Mapping[str, Callable[[str], object]] = {
    ".yaml": yaml.safe_load,
    ".yml": yaml.safe_load,
    ".json": _read_json,
    ".cfg": _read_cfg,
}
"""The reader of a recipe file, by suffix; each takes the file's text."""
