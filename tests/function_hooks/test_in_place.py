"""In-place operations: every name of a tensor sees its present value."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.joins.cases import AddsInPlace, calibrated, serving


def test_a_tensor_that_was_added_to_in_place_is_another_tensor() -> None:
    x = torch.randn(16, 4)
    model = calibrated(AddsInPlace(), x)
    left, right = serving(model, "", "add", 0), serving(model, "", "add", 1)
    assert right is model.one.input_quantizer
    assert len({id(q) for q in (left, right, model.two.input_quantizer)}) == 3
    with torch.no_grad():
        y = left(model.one(x)) + right(x)
        expected = serving(model, "two", "output")(model.two(y))
        before = x.clone()
        assert torch.equal(model(x), expected)
    assert torch.equal(x, before)
    # The quantizer behind the sum has seen the sum, not what was there before.
    seen = model.two.input_quantizer
    assert float(seen.max_val) == pytest.approx(float(y.max()), abs=0.1)
    assert float(seen.min_val) == pytest.approx(float(y.min()), abs=0.1)


class ReluInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.one(x)
        left = self.two(y)
        F.relu_(y)
        return left, self.three(y)


def test_relu_in_place_between_two_consumers_hands_the_grid_on() -> None:
    x = torch.randn(16, 4)
    model = calibrated(ReluInPlace(), x, recipe=Recipe(outputs=False))
    assert model.three.input_quantizer is model.two.input_quantizer
    with torch.no_grad():
        y = model.two.input_quantizer(model.one(x))
        left, right = model(x)
        assert torch.equal(left, model.two(y))
        assert torch.equal(right, model.three(F.relu(y)))


class InPlaceOnASharedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.one(x)
        changed = kept
        changed += x
        return self.two(kept), changed


def test_every_name_of_a_tensor_sees_what_an_in_place_operation_did() -> None:
    x = torch.randn(16, 4)
    model = calibrated(InPlaceOnASharedInput(), x, recipe=Recipe(outputs=False))
    with torch.no_grad():
        left, changed = model(x)
        y = serving(model, "", "add", 0)(model.one(x)) + model.one.input_quantizer(x)
        assert torch.equal(changed, y)
        assert torch.equal(left, model.two(y))


class Swaps(nn.Module):
    """The planned call itself meets something else."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, other: Any) -> Tensor:
        return self.two(self.one(x) + other)


@pytest.mark.parametrize("other", [1, 1.5, torch.ones(4, dtype=torch.int64), torch.tensor(2.0)])
def test_a_planned_call_with_something_else_stays_float(other: Any) -> None:
    model, x = Swaps(), torch.randn(8, 4)
    prepare(model, Recipe(outputs=False), (x, x))
    model.train()
    model(x, x)
    model.eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="add.* in .*took another path"):
        found = model(x, other)
    with torch.no_grad():
        assert torch.equal(found, model.two(model.one(x) + other))
        model(x, other)
