"""Forwards that take another path than the planned one."""

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from tests.join_networks import NETWORKS
from tests.joins.cases import PlainBlock, calibrated, serving, the_plan

# Another path than the plan knows


class Branches(nn.Module):
    """Takes another path on demand, before the add that every forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.path = "plain"

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.path == "extra add":
            y = y + 100 * x
        elif self.path == "extra mul":
            y = y * x
        elif self.path == "integer add":
            y = y + torch.arange(4)
        elif self.path == "fewer":
            return self.two(y)
        return self.two(y + x)


@pytest.fixture
def branching() -> Branches:
    model = Branches()
    prepare(model, Recipe(outputs=False))
    model.train()
    with torch.no_grad():
        model(torch.randn(32, 4))
    return model.eval()  # type: ignore[return-value]


def test_a_planned_call_that_does_not_happen_is_no_error(branching: Branches) -> None:
    branching.path = "fewer"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(branching(x), branching.two(branching.one(x)))


def test_arithmetic_with_integers_in_between_changes_nothing(branching: Branches) -> None:
    branching.path = "integer add"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = branching.one(x) + torch.arange(4)
        y = serving(branching, "", "add", 0)(y) + serving(branching, "", "add", 1)(x)
        assert torch.equal(branching(x), branching.two(y))


@pytest.mark.parametrize("path", ["extra mul", "extra add"])
def test_a_call_that_was_not_planned_stays_float_with_one_warning(
    branching: Branches, path: str
) -> None:
    branching.path = path
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            branching(torch.randn(8, 4))
    assert len(caught) == 1
    assert re.search(
        rf"{path.removeprefix('extra ')}.* in .*the model's own forward.* took another path",
        str(caught[0].message),
    )


def test_a_call_on_another_path_is_never_given_a_wrong_quantizer(branching: Branches) -> None:
    branching.path = "extra add"
    x = torch.randn(8, 4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = branching(x)
        y = branching.one(x) + 100 * x
        float_add = branching.two(y + x)
        planned = serving(branching, "", "add", 0)(y) + serving(branching, "", "add", 1)(x)
        # The added call stays float, and so may the one behind it.
        assert torch.equal(found, float_add) or torch.equal(found, branching.two(planned))


class BySign(nn.Module):
    """Control flow on data."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        y = torch.sigmoid(y) if float(x.sum()) > 0 else y * x
        return self.two(y)


def test_control_flow_on_data_is_planned_as_it_ran_and_warned_of_afterwards() -> None:
    model = BySign()
    prepare(model, "int8", torch.ones(2, 4))
    model.train()
    model(torch.ones(2, 4))
    with pytest.warns(UserWarning, match="(mul|sigmoid).* in .*made in training, not in"):
        model(-torch.ones(2, 4))
    model(-torch.ones(2, 4))


# Unusual calls


def test_two_calls_per_step_with_different_shapes() -> None:
    model = NETWORKS["mobilenet_v3_block"][0]()
    prepare(model, "int8", torch.randn(2, 8, 8, 8))
    model.train()
    for _ in range(2):
        left, right = model(torch.randn(4, 8, 8, 8)), model(torch.randn(3, 8, 4, 4))
        (left.mean() - right.mean()).square().backward()
    x = torch.randn(2, 8, 4, 4)
    quantized = convert(model.eval(), x)
    with torch.no_grad():
        unfusable = (quantized(x) - model(x)).abs() / quantized.output_steps["output"]
    assert (unfusable <= 2).float().mean() >= 0.99


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = PlainBlock()
        self.head = nn.Linear(4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        a, b = (self.encoder(x).mean((2, 3)) for x in (left, right))
        return self.head(a - b)


def test_a_module_that_runs_twice_per_forward_is_quantized_in_both_runs() -> None:
    inputs = torch.randn(4, 4, 6, 6), torch.randn(4, 4, 5, 5)
    model = calibrated(Siamese(), *inputs)
    runs: list[int] = []
    add = serving(model, "encoder", "add", 0)
    handle = add.register_forward_hook(lambda *_: runs.append(1))
    found = model(*inputs)
    handle.remove()
    assert len(runs) == 2
    assert torch.equal(convert(model, inputs)(*inputs), found)


class HalfFrozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = PlainBlock(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features.mean((2, 3)))


def test_a_part_without_gradients_is_planned_and_observed_all_the_same() -> None:
    model, x = HalfFrozen(), torch.randn(4, 4, 6, 6)
    prepare(model, "int8")
    model.train()
    model(x).sum().backward()
    assert model.backbone.one.weight.grad is None
    assert model.head.weight.grad is not None
    assert serving(model, "backbone", "add", 0).calibrated
    assert all(model.get_submodule(t.quantizer).calibrated for t in the_plan(model).tensors)
