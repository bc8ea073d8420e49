"""prepare_like: the layers of a checkpoint, with its specs."""

from typing import Any

import pytest
from torch import nn

from lightning_qat.layers import LinearQAT, QATLayer
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.prepare_like import prepare_like
from tests.models import Nested, ResidualAdd, linear
from tests.prepare.cases import Aliased, quantizers, types

# From a checkpoint


RECIPES: list[Any] = [
    "int8",
    "amct",
    {"overrides": {"conv1": {"weight": {"bits": 4}}, "head": None}},
    {"activation": {"clip": [-1.0, 1.0]}},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_prepare_like_swaps_the_layers_of_the_checkpoint_with_its_specs(recipe: Any) -> None:
    source = ResidualAdd()
    prepare(source, recipe)
    model = ResidualAdd()
    report = prepare_like(model, source.state_dict())
    assert types(model) == types(source)
    assert {n: q.spec for n, q in quantizers(model).items()} == {
        n: q.spec for n, q in quantizers(source).items()
    }
    assert {s.name for s in report.swapped} == {
        n for n, m in source.named_modules() if isinstance(m, QATLayer)
    }
    model.load_state_dict(source.state_dict())


def test_prepare_like_takes_a_model_with_aliases() -> None:
    source = Aliased()
    prepare(source)
    model = Aliased()
    prepare_like(model, source.state_dict())
    assert type(model.first) is LinearQAT
    model.load_state_dict(source.state_dict())


def test_prepare_like_takes_a_root_layer() -> None:
    source, model = nn.Linear(2, 2), nn.Linear(2, 2)
    prepare(source, {"weight": {"bits": 4}})
    prepare_like(model, source.state_dict())
    assert type(model) is LinearQAT
    assert model.weight_quantizer.spec.bits == 4


def test_prepare_like_refuses_the_state_dict_of_a_float_model() -> None:
    with pytest.raises(ValueError, match="The state_dict holds no quantizers: it is of a float"):
        prepare_like(linear(), linear().state_dict())


def test_prepare_like_refuses_layers_that_the_model_does_not_have() -> None:
    source = Nested()
    prepare(source)
    model = ResidualAdd()
    before = types(model)
    with pytest.raises(
        ValueError, match=r"quantizes \['left', 'right'\], which ResidualAdd does not have as"
    ):
        prepare_like(model, source.state_dict())
    assert types(model) == before
