"""Code of training alone is in no plan: it takes no quantizers of other code, without a warning."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_qat.convert.convert import convert
from lightning_qat.prepare.prepare import prepare
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.phases import set_observing
from tests.joins.cases import serving, the_plan


class Noise(nn.Module):
    """Adds 1000 in training: an addition in ``forward``, as its parent makes one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x + torch.full_like(x, 1000.0)


class Dropout(nn.Module):
    """Dropout by hand, in a function with a keyword for the mode, as timm's ``DropPath``."""

    def forward(self, x: Tensor) -> Tensor:
        return drop(x, training=self.training) + drop(x, training=self.training)


def drop(x: Tensor, training: bool = False) -> Tensor:
    if not training:
        return x
    mask = x.new_ones(x.shape[0], 1)
    return x * mask.div_(0.5)


class Block(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.one, self.inside, self.two = nn.Linear(4, 4), inside, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(self.one(x))
        return self.two(y + x)


X = torch.linspace(-1, 1, 32).reshape(8, 4)


@pytest.mark.parametrize("example", [X, None], ids=["by example", "first forward"])
@pytest.mark.parametrize("again", [False, True], ids=["", "checkpointed"])
def test_a_module_without_planned_calls_lends_none_to_its_parent(
    example: Tensor | None, again: bool
) -> None:
    model = Block(Noise())
    prepare(model, Recipe(outputs=False), example_inputs=example)
    run: Callable[[Tensor], Tensor] = model
    if again:
        run = lambda x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
    for _ in range(3):
        run(X)
    set_observing(model, False)
    with torch.no_grad():
        found = model(X)
        noisy = model.one(X) + 1000.0
        added = serving(model, "", "add", 0)(noisy) + serving(model, "", "add", 1)(X)
        assert torch.equal(found, model.two(added))
    # The range of the sum's left operand holds the noise, and its right one does not.
    assert float(serving(model, "", "add", 0).max_val) > 900
    assert float(serving(model, "", "add", 1).max_val) < 2
    assert list(the_plan(model).sites) == [""]
    assert convert(model.eval(), X)


class Checkpointed(Block):
    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            y = self.inside(self.one(x))
            return y + x

        return self.two(checkpoint(part, x, use_reentrant=False))


def test_what_backward_runs_again_is_what_ran() -> None:
    torch.manual_seed(0)
    plain, again = Block(Noise()), Checkpointed(Noise())
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        prepare(model, Recipe(outputs=False), example_inputs=X)
        for _ in range(2):
            model.zero_grad()
            model(X).square().sum().backward()
    gradients = [[p.grad for p in model.parameters()] for model in (plain, again)]
    for one, other in zip(*gradients, strict=True):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)


@pytest.mark.parametrize("inside", [Noise, Dropout])
def test_nobody_is_told_to_exclude_it(inside: type[nn.Module]) -> None:
    # Warnings are errors.
    model = Block(inside())
    prepare(model, "int8", example_inputs=X)
    for _ in range(3):
        model(X).sum().backward()
    model.eval()(X)
    assert convert(model, X)


class OwnNoise(nn.Module):
    """Noise in the very forward that makes planned calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        if self.training:
            y = y + torch.full_like(y, 1000.0)
            y = y * torch.ones_like(y)
        return self.two(y + x)


@pytest.mark.parametrize("example", [X, None], ids=["by example", "first forward"])
def test_a_branch_of_training_in_a_planned_forward_stays_float(example: Tensor | None) -> None:
    model = OwnNoise()
    prepare(model, Recipe(outputs=False), example_inputs=example)
    for _ in range(3):
        model(X)
    set_observing(model, False)
    with torch.no_grad():
        noisy = model.one(X) + 1000.0
        added = serving(model, "", "add", 0)(noisy) + serving(model, "", "add", 1)(X)
        assert torch.equal(model(X), model.two(added))
    assert not [call for call in the_plan(model).left_float if "mul" in call]
