"""Recipe files: YAML, JSON and AMCT's cfg."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_qat.plain_data.parse_json import parse_json
from lightning_qat.recipe.amct_config import cfg_recipe, is_json_config, json_recipe


def _read_yaml(text: str) -> object:
    # Here, because a recipe of Python needs no YAML.
    from lightning_qat.plain_data.parse_yaml import parse_yaml

    return parse_yaml(text)


def _read_cfg(text: str) -> Mapping[str, Any]:
    # Here, because protobuf takes longer to import than the rest of this module.
    from lightning_qat.recipe.amct_cfg import parse_cfg

    return cfg_recipe(parse_cfg(text))


def _read_json(text: str) -> object:
    values = parse_json(text)
    return json_recipe(values) if isinstance(values, dict) and is_json_config(values) else values


READERS: Mapping[str, Callable[[str], object]] = {
    ".yaml": _read_yaml,
    ".yml": _read_yaml,
    ".json": _read_json,
    ".cfg": _read_cfg,
}
"""The reader of a recipe file, by suffix; each takes the file's text."""
