"""Relu and the quantizer that alone reads its result: one pass, and nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import convert, prepare
from lightning_qat.function_hooks.relu_fusion import ReluFusion
from lightning_qat.numerics.fake_quantize import clamp_and_quantize, fake_quantize
from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantizer
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.training.range_sync import activation_quantizers, commit_ranges
from tests.join_networks import CNNS, NETWORKS, inputs_for

LAYERS = {"joins": False, "outputs": False}
LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}


def nodes(result: Tensor) -> list[str]:
    """The names of all nodes of a graph."""
    found, waiting = set(), [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


def relus_of(result: Tensor) -> int:
    """How many relus have a backward of their own."""
    kinds = ("ReluBackward", "HardtanhBackward", "_ClampBackward")
    return sum(name.startswith(kinds) for name in nodes(result))


def ready(model: nn.Module, x: Tensor, recipe: Any = "int8", **options: Any) -> nn.Module:
    """Prepared, in training, with frozen ranges, after the forward from which it learns."""
    prepare(model, recipe, x, **options)
    model.train()(x)
    for quantizer in activation_quantizers(model).values():
        quantizer.observing = False
    model(x)
    return model


class Net(nn.Module):
    """Two layers and what a test puts between them."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU(inplace=True)
        self.between = between
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        return self.between(self, self.first(x))


def plain(net: Any, x: Tensor) -> Tensor:
    result: Tensor = net.second(F.relu(x))
    return result


def in_place(net: Any, x: Tensor) -> Tensor:
    result: Tensor = net.second(net.relu(x))
    return result


def without_result(net: Any, x: Tensor) -> Tensor:
    net.relu(x)
    result: Tensor = net.second(x)
    return result


def with_shape(net: Any, x: Tensor) -> Tensor:
    y = F.relu6(x)
    assert y.shape == x.shape
    assert y.size(0) == len(y)
    assert y.dtype == torch.float32
    result: Tensor = net.second(y)
    return result


def added(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    return net.second(y) + y.sum(1, keepdim=True).detach()


def two_layers(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    result: Tensor = net.second(y) + net.second(torch.exp(y))
    return result


def changed_afterwards(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    x += 1
    return net.second(y) + x.sum()


def written_afterwards(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x)
    x[:, 0] = 1
    return net.second(y) + x.sum()


def changed_beneath(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x.view(6, 8)).view(8, 6)
    x += 1
    return net.second(y) + x.sum()


def viewed(net: Any, x: Tensor) -> Tensor:
    y = F.relu(x.view(4, 2, 6))
    x += 1
    return net.second(y).flatten(0, 1) + x.sum()


def returned(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu(x)
    return net.second(y), y


def twice(net: Any, x: Tensor) -> Tensor:
    result: Tensor = net.second(F.relu(F.hardtanh(x, -0.5, 0.5)))
    return result


ALONE = {f.__name__: f for f in (plain, in_place, with_shape)}
SHARED = {
    f.__name__: f
    for f in (
        added,
        two_layers,
        changed_afterwards,
        written_afterwards,
        changed_beneath,
        viewed,
        returned,
    )
}
OTHERS = {f.__name__: f for f in (without_result, twice)}


@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("recipe", ["int8", LAYERS], ids=["joins", "layers"])
@pytest.mark.parametrize("between", ALONE)
def test_a_relu_that_one_quantizer_reads_has_no_backward(
    between: str, recipe: Any, memory: Any
) -> None:
    x = torch.randn(8, 6)
    net = ready(Net(ALONE[between]), x, recipe, memory=memory)
    assert relus_of(net(x)) == 0


@pytest.mark.parametrize("between", SHARED)
def test_a_relu_with_other_readers_keeps_it(between: str) -> None:
    x = torch.randn(8, 6)
    net = ready(Net(SHARED[between]), x, LAYERS)
    result = net(x)
    assert relus_of(result if isinstance(result, Tensor) else result[0] + result[1].sum()) >= 1


@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize(
    "recipe", ["int8", "w4a4", LAYERS, LEARNED], ids=["int8", "w4a4", "layers", "learned"]
)
@pytest.mark.parametrize("between", ALONE | SHARED | OTHERS)
def test_values_ranges_and_gradients_are_those_of_two_passes(
    between: str, recipe: Any, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    function = (ALONE | SHARED | OTHERS)[between]
    net, x = Net(function), torch.randn(8, 6)
    other = copy.deepcopy(net)
    fused = steps(net, x, recipe, memory)
    monkeypatch.setattr(ReluFusion, "fused", lambda self, site, relu: None)
    for one, two in zip(fused, steps(other, x, recipe, memory), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


def steps(net: nn.Module, x: Tensor, recipe: Any, memory: Any) -> list[Tensor]:
    """What four batches give, with ranges that follow three of them."""
    net = copy.deepcopy(net)
    prepare(net, recipe, x, memory)
    found: list[Tensor] = []
    for batch in range(4):
        for quantizer in activation_quantizers(net).values():
            quantizer.deferred, quantizer.observing = True, batch < 3
        net.zero_grad()
        result = net.train()((batch + 1) * x)
        leaves = [result] if isinstance(result, Tensor) else list(result)
        torch.autograd.backward([leaf.square().sum() for leaf in leaves])
        commit_ranges(net)
        found += [*leaves, *(p.grad for p in net.parameters() if p.grad is not None)]
        found += list(net.buffers())
    return [leaf.detach().clone() for leaf in found]


@pytest.mark.parametrize("name", CNNS)
@pytest.mark.parametrize("recipe", ["int8", LAYERS], ids=["joins", "layers"])
def test_networks_have_fewer_passes(name: str, recipe: Any) -> None:
    torch.manual_seed(0)
    net, x = NETWORKS[name][0](), inputs_for(name)
    prepare(net, recipe, x)
    before = relus_of(net.train()(x))
    after = relus_of(ready(net, x, recipe)(x))
    assert after < before or (name, recipe) == ("dense_block", LAYERS)


def test_a_reader_that_comes_later_gets_the_float_tensor() -> None:
    def sometimes(net: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        if net.seen is not None:
            net.seen = y.exp()
        result: Tensor = net.second(y)
        return result

    x = torch.randn(8, 6)
    net = ready(Net(sometimes), x, LAYERS)
    assert relus_of(net(x)) == 0
    net.seen = x
    net(x)
    torch.testing.assert_close(net.seen, F.relu(net.first(x)).exp(), rtol=0, atol=0)
    assert relus_of(net(x)) == 1


def test_a_quantizer_that_comes_later_quantizes_the_float_tensor() -> None:
    def either(net: Any, x: Tensor) -> Tensor:
        y = F.relu(x)
        result: Tensor = (net.second if net.seen is None else net.third)(y)
        return result

    x = torch.randn(8, 6)
    net: Any = Net(either)
    net.third = nn.Linear(6, 3)
    prepare(net, LAYERS, x)
    for net.seen in (x, None):
        net.train()(x)
    for quantizer in activation_quantizers(net).values():
        quantizer.observing = False
    net.third.input_quantizer.max_val.mul_(2)
    net(x)
    net.seen = x
    wanted = net.third(F.relu(net.first(x)))
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=0)


def test_an_initial_state_is_read_in_float() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.other = nn.Linear(6, 4), nn.Linear(4, 2)
            self.rnn = nn.GRU(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            state = F.relu(self.start(x[None, :, 0]))
            outputs, _ = self.rnn(x, state)
            result: Tensor = outputs.sum(1)[:, :2] + self.other(state)[0]
            return result

    torch.manual_seed(0)
    x = torch.randn(3, 5, 6)
    net: Any = ready(Stateful(), x, LAYERS)
    state = F.relu(net.start(x[None, :, 0]))
    wanted = net.rnn(x, state)[0].sum(1)[:, :2] + net.other(state)[0]
    torch.testing.assert_close(net(x), wanted, rtol=0, atol=0)


def test_nothing_of_it_is_left_in_a_converted_model() -> None:
    x = torch.randn(8, 6)
    for recipe in ("int8", LAYERS):
        net = ready(Net(plain), x, recipe).eval()
        converted = convert(net, x)
        assert "hardtanh" not in str(converted.program.graph)
        torch.testing.assert_close(net(x), converted(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.03, 0.7, 5.0])
@pytest.mark.parametrize("zero_point", [-128.0, 0.0, 100.0])
@pytest.mark.parametrize("ends", [(0.0, float("inf")), (0.0, 6.0), (-1.0, 1.0), (2.0, 3.0)])
@pytest.mark.parametrize("int_repr", [False, True], ids=["fast", "compact"])
def test_clamped_grids_are_clamped_tensors(
    scale: float, zero_point: float, ends: tuple[float, float], int_repr: bool
) -> None:
    torch.manual_seed(0)
    steps = torch.arange(-300.0, 300.0) / 2
    x = torch.cat([steps * scale, torch.tensor([*ends, torch.nan])]).requires_grad_()
    numbers = torch.tensor(scale), torch.tensor(zero_point), IntegerGrid(-128, 127)
    results = []
    for two_passes in (False, True):
        x.grad = None
        if two_passes:
            y = fake_quantize(F.hardtanh(x, *ends), *numbers)
        else:
            y = clamp_and_quantize(x, ends, *numbers, carries_int_repr=int_repr)
        y.backward(torch.linspace(1, 2, len(x)))
        assert x.grad is not None
        results.append((y.detach(), x.grad[:-1]))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ends", [(0.0, float("inf")), (0.0, 6.0), (0.0, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("step", [0.3, 0.02, 0.4])
@pytest.mark.parametrize("low", [None, 0.0], ids=["scale", "ends"])
def test_learned_steps_get_the_gradient_of_clamped_values(
    ends: tuple[float, float], step: float, low: float | None
) -> None:
    """In double precision, by the formulas of LSQ for what relu has left."""
    torch.manual_seed(0)
    grid = IntegerGrid(0, 15) if low is None else IntegerGrid(-8, 7)
    x = (torch.randn(400) * 4).requires_grad_()
    scale = torch.tensor(step, requires_grad=True)
    lowest = None if low is None else torch.tensor(low)
    call = learned_fake_quantizer(scale, lowest, grid, None, saves_input=True, clamped=ends)
    upstream = torch.rand(400)
    y = call(x)
    y.backward(upstream)
    assert x.grad is not None
    assert scale.grad is not None
    z = x.detach().double().clamp(*ends)
    rounded = torch.round(z.float() / torch.tensor(step)).double()
    inside = rounded <= 15
    torch.testing.assert_close(y.detach().double(), rounded.clamp(max=15) * step)
    passes = inside & (x > 0) & (x < ends[1])
    torch.testing.assert_close(x.grad, upstream * passes, rtol=0, atol=0)
    of_scale = torch.where(inside, rounded - z / step, 15.0) * upstream
    torch.testing.assert_close(scale.grad.double(), of_scale.sum(), rtol=1e-5, atol=1e-5)
