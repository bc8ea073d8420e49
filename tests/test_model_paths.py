"""``ModelPaths``: names, aliases, and paths without the names of ``torch.compile``."""

import torch
from torch import nn

from lightning_qat.model.paths import ModelPaths, modules_by_path


def test_aliases_are_found_under_every_path_and_named_after_the_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.append(model[0])
    paths = ModelPaths.of(model)
    assert list(paths.by_path) == ["", "0", "1", "2"]
    assert paths.by_path["2"] is model[0]
    assert paths.names[model[0]] == ("0", "2")
    assert paths.name(model[0]) == "0"
    assert paths.name(model) == ""


def test_wrappers_of_torch_compile_are_left_out() -> None:
    inner = nn.Linear(2, 2)
    model = nn.Sequential(nn.ReLU())
    model.append(torch.compile(inner, backend="eager"))  # type: ignore[arg-type]
    paths = ModelPaths.of(model)
    assert list(paths.by_path) == ["", "0", "1"]
    assert paths.by_path["1"] is inner
    assert paths.name(inner) == "1"
    assert model[1] not in paths.names
    assert dict(modules_by_path(model)) == dict(paths.by_path)
