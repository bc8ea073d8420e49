"""Learned ranges that are too narrow widen at once; what their parameter is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import ActivationSpec, Recipe, prepare
from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.factory import activation_quantizer
from lightning_qat.quantizers.learned_activation import LearnedActivation
from lightning_qat.training.range_sync import commit_ranges


def learning(quantizer: str = "learned", **spec: Any) -> Any:
    """A quantizer that has seen a batch from 0 to 1, and learns from there."""
    chosen: Any = quantizer
    made = activation_quantizer(ActivationSpec(quantizer=chosen, **spec)).train()
    made(torch.linspace(0.0, 1.0, 1000))
    assert isinstance(made, LearnedActivation)
    assert made.is_learning
    return made


def highest(quantizer: Any) -> float:
    scale, zero_point = quantizer.scale_and_zero_point()
    return float((quantizer.grid.qmax - zero_point) * scale)


def batch_with(outside: int) -> Tensor:
    """So many of 1000 values are 3, the others lie between 0 and 1."""
    x = torch.linspace(0.0, 1.0, 1000)
    x[:outside] = 3.0
    return x


def after_step(quantizer: Any) -> Any:
    """As an optimizer leaves it, but for its numbers; then what was seen is committed."""
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(0.0)
    commit_ranges(quantizer)
    return quantizer


SPECS = {"affine": {}, "from zero": {"fixed_min": True}, "symmetric": {"symmetric": True}}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["learned", "ulq"])
def test_a_learned_range_widens_at_once_to_a_batch_of_which_it_clips_too_much(
    kind: str, spec: str
) -> None:
    """More than 1 of 256 values at 8 bits; committed for all processes together."""
    quantizer = learning(kind, **SPECS[spec])
    quantizer.deferred = True
    before = [p.detach().clone() for p in quantizer.parameters()]
    quantizer(batch_with(3))
    after_step(quantizer)
    assert all(torch.equal(p, old) for p, old in zip(quantizer.parameters(), before, strict=True))
    quantizer(batch_with(4))
    assert highest(quantizer) == pytest.approx(1.0, rel=0.01), "The step must end as it began."
    after_step(quantizer)
    assert highest(quantizer) == pytest.approx(3.0, rel=0.01)
    # Gradients come back from there, and the range may learn to be narrower again.
    x = batch_with(4).requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert float(x.grad[0]) == 1.0


def test_fewer_integers_may_clip_more() -> None:
    quantizer = learning(bits=4)
    quantizer.deferred = True
    for outside, high in ((62, 1.0), (63, 3.0)):
        quantizer(batch_with(outside))
        after_step(quantizer)
        assert highest(quantizer) == pytest.approx(high, rel=0.01)


def test_a_loop_that_commits_nothing_widens_after_the_optimizer_s_step() -> None:
    """Backward needs the parameters as they were."""
    quantizer = learning()
    optimizer = torch.optim.SGD(quantizer.parameters(), 1e-6)
    x = batch_with(500).requires_grad_()
    for high in (1.0, 3.0):
        # Twice in a forward, as a module that is called twice.
        loss = quantizer(x).sum() + quantizer(2 * x).sum()
        assert highest(quantizer) == pytest.approx(high if high == 1 else 6.0, rel=0.01)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["learned", "ulq"])
def test_ranges_may_be_committed_before_backward_and_before_the_last_of_several_batches(
    kind: str,
) -> None:
    """Backward needs the parameters of the forward; a checkpoint has what they become."""
    quantizer = learning(kind)
    quantizer.deferred = True
    optimizer = torch.optim.SGD(quantizer.parameters(), 1e-6)
    for outside in (900, 0):
        loss = quantizer(batch_with(outside)).sum()
        commit_ranges(quantizer)
        assert highest(quantizer) == pytest.approx(1.0, rel=0.01)
        loss.backward()
    optimizer.step()
    saved = activation_quantizer(quantizer.spec)
    saved.load_state_dict(quantizer.state_dict())
    assert highest(saved) == highest(quantizer) == pytest.approx(3.0, rel=0.01)


def test_frozen_ranges_are_not_widened() -> None:
    quantizer = learning()
    quantizer.deferred, quantizer.observing = True, False
    quantizer(batch_with(900))
    after_step(quantizer)
    assert highest(quantizer) == pytest.approx(1.0, rel=0.01)


def test_a_range_that_was_given_or_is_held_is_not_widened() -> None:
    given = activation_quantizer(ActivationSpec(quantizer="learned", clip=(0.0, 1.0))).train()
    held = learning()
    held.requires_grad_(False)
    for quantizer in (given, held):
        for deferred in (False, True):
            quantizer.deferred = deferred
            for _ in range(2):
                quantizer(batch_with(900))
                after_step(quantizer)
        assert highest(quantizer) == pytest.approx(1.0, rel=0.01)


def test_per_sample_gradients_are_those_of_a_range_that_is_not_looked_at() -> None:
    """A transform of torch.func must have no effects."""
    quantizer = learning()
    x = torch.full((4, 1000), 3.0)
    gradients = torch.func.vmap(torch.func.grad(lambda row: quantizer(row).sum()))(x)
    assert torch.equal(gradients, torch.zeros_like(x))
    assert highest(quantizer) == pytest.approx(1.0, rel=0.01)


def test_one_batch_of_sixteen_is_looked_at_and_a_checkpoint_knows_which() -> None:
    quantizer = learning()
    quantizer.deferred = True
    looked = []
    for number in range(1, 40):
        if quantizer.looking:
            looked.append(number)
        quantizer(batch_with(0))
        commit_ranges(quantizer)
        if number == 20:
            other = activation_quantizer(quantizer.spec)
            other.load_state_dict(quantizer.state_dict())
            other.deferred = True
            quantizer = other.train()
    assert looked == [*range(1, 16), 16, 32]


def test_a_range_learned_from_random_weights_reaches_a_target_far_away() -> None:
    """The first outputs are below 1, the targets up to 200."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
    x = torch.randn(64, 4)
    target = 100 * x[:, :1] * x[:, 1:2]
    prepare(model, Recipe(activation=ActivationSpec(quantizer="learned")), x)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * target.square().mean()


def test_half_a_width_has_the_gradient_of_the_step() -> None:
    """And so does a negative one with the other sign; 64 stands for a step of 0.5."""
    x, grid = 2 * torch.randn(400), IntegerGrid.activation(8)
    step = torch.tensor(0.5, requires_grad=True)
    learned_fake_quantize(x, step, None, grid).square().sum().backward()
    assert step.grad is not None
    quantizer = learning(symmetric=True)
    quantizer.looking = False
    for sign in (1.0, -1.0):
        with torch.no_grad():
            quantizer.half_width.fill_(sign * 64.0)
        quantizer.zero_grad()
        quantizer(x).square().sum().backward()
        torch.testing.assert_close(quantizer.half_width.grad, sign * step.grad)


def test_a_checkpoint_that_learned_the_step_itself_loads_to_the_bit() -> None:
    quantizer = learning()
    scale, zero_point = quantizer.scale_and_zero_point()
    state = quantizer.state_dict()
    del state["half_width"]
    other = activation_quantizer(quantizer.spec)
    other.load_state_dict({**state, "scale": scale})
    assert torch.equal(other.scale_and_zero_point()[0], scale)
    assert torch.equal(other.scale_and_zero_point()[1], zero_point)


def test_a_compiled_forward_looks_at_the_same_batches() -> None:
    """Counting is left to whoever commits: a graph that looks, and one that does not."""
    torch._dynamo.reset()
    graphs = list[torch.fx.GraphModule]()

    def count(graph: torch.fx.GraphModule, example_inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    quantizer = learning()
    quantizer.deferred = True
    call = torch.compile(quantizer, backend=count, fullgraph=True)
    for outside, high in ((0, 1.0), (900, 3.0), *[(0, 3.0)] * 40):
        call(batch_with(outside)).sum().backward()
        after_step(quantizer)
        assert highest(quantizer) == pytest.approx(high, rel=0.01)
    assert len(graphs) == 2
