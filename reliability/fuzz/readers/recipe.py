"""Recipe files in YAML and JSON, and the recipe's questions to a model."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_qat.recipe.recipe import PRESETS, Recipe
from reliability.fuzz.mutate_text import mutate_json, mutate_yaml
from reliability.fuzz.reader import Reader

_LAYERS = {"stem": "Conv2d", "encoder.0.conv": "Conv2d", "encoder.0.fc": "Linear", "head": "Linear"}
_FULL = {
    "preset": "w4a8",
    "weight": {"bits": 4, "granularity": "per_tensor", "quantizer": "learned", "initial": "minmax"},
    "activation": {"bits": 8, "calibration": "mse", "clip": [-1.5, 2.5], "samples": 64},
    "joins": "fused_sums",
    "include": ["encoder.*", "type:Linear"],
    "exclude": ["stem"],
    "overrides": {"head": {"weight": {"bits": 8}, "activation": {"bits": 6}}, "type:Conv*": None},
    "first_last": 8,
}


def _seeds(folder: Path) -> Sequence[Path]:
    values = {"full": _FULL, "amct": PRESETS["amct"].to_dict(), "w4a4": PRESETS["w4a4"].to_dict()}
    paths = []
    for name, recipe in values.items():
        paths += [folder / f"{name}.yaml", folder / f"{name}.json"]
        paths[-2].write_text(yaml.safe_dump(recipe, sort_keys=False))
        paths[-1].write_text(json.dumps(recipe, indent=2))
    return paths


def _mutate(content: bytes, generator: random.Random) -> bytes:
    return (mutate_json if content.startswith(b"{") else mutate_yaml)(content, generator)


def read(path: Path) -> None:
    """Read it, print it as the command does, and read that; ask it about a model."""
    recipe = Recipe.load(path)
    printed = yaml.safe_dump(recipe.to_dict(), sort_keys=False)
    again = Recipe.from_dict(yaml.safe_load(printed))
    assert again == recipe, f"printed and read again it is another recipe: {again} {recipe}"
    for name, kind in _LAYERS.items():
        recipe.for_layer(name, kind)
        recipe.why_float(name, kind)
    recipe.check_patterns(_LAYERS, ["MultiheadAttention", "Embedding", "ConvTranspose2d"])


READER = Reader("recipe", _seeds, _mutate, read, (ValueError,))
