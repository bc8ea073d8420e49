"""The configuration of LightningCLI, as `lightning-qat export --config` reads it."""

import random
from collections.abc import Sequence
from pathlib import Path

import yaml

from lightning_qat.cli.module_class import LightningConfig
from lightning_qat.recipe.recipe import Recipe
from reliability.fuzz.mutate_text import mutate_yaml
from reliability.fuzz.reader import Reader

_CONFIG = {
    "seed_everything": 1,
    "model": {
        "class_path": "reliability.fuzz.readers.lightning_config.Module",
        "init_args": {"width": 4, "names": {"a": 1}},
    },
    "data": {"class_path": "reliability.fuzz.readers.lightning_config.Module"},
    "trainer": {
        "max_epochs": 1,
        "callbacks": [
            {
                "class_path": "lightning_qat.QATCallback",
                "init_args": {
                    "recipe": {"preset": "int8", "overrides": {"head": {"weight": {"bits": 4}}}},
                    "exporters": ["cann"],
                },
            },
            "lightning.pytorch.callbacks.RichProgressBar",
        ],
    },
}


class Module:
    """What the configuration makes."""

    def __init__(self, width: int = 8, names: dict[str, int] | None = None) -> None:
        self.width, self.names = width, names


def _seeds(folder: Path) -> Sequence[Path]:

    (folder / "config.yaml").write_text(yaml.safe_dump(_CONFIG, sort_keys=False))
    (folder / "fit.yaml").write_text(yaml.safe_dump({"fit": _CONFIG}, sort_keys=False))
    return [folder / "config.yaml", folder / "fit.yaml"]


def _mutate(content: bytes, generator: random.Random) -> bytes:
    return mutate_yaml(content, generator)


def _read(path: Path) -> None:
    config = LightningConfig(path)
    assert isinstance(config.class_path, str | None)
    assert isinstance(config.data_class_path, str | None)
    config.arguments(Module)
    config.data_arguments(Module)
    recipe = config.quantization.get("recipe", "int8")
    if isinstance(recipe, dict):
        Recipe.load(recipe)


READER = Reader("lightning_config", _seeds, _mutate, _read, (ValueError,))
