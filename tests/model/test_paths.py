"""``ModelPaths``: names, aliases, and paths without the names of ``torch.compile``."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_qat import prepare
from lightning_qat.model.paths import ModelPaths, modules_by_path
from tests.join_networks import NETWORKS, inputs_for


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


@pytest.mark.parametrize("name", ["resnet8", "unet"])
def test_prepare_walks_a_models_modules_nine_times_at_most(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice for ``ModelPaths``; the others set modes and switches of all modules."""
    model: nn.Module = NETWORKS[name][0]()
    named_modules, walks, paths = nn.Module.named_modules, [], []

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is model and not args:
            walks.append(self)
            paths.extend([] if kwargs.get("remove_duplicate", True) else [self])
        return named_modules(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    prepare(model, "int8", inputs_for(name))
    assert len(paths) == 2
    assert len(walks) <= 9
