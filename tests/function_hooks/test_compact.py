"""``memory="compact"``: the same numbers and gradients to the bit, from fewer bytes."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.saved import bytes_for_backward
from lightning_qat import prepare
from lightning_qat.function_hooks.compact import compactly
from lightning_qat.numerics.bitmask import pack_bits, unpack_bits
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid
from tests.join_networks import NETWORKS, inputs_for
from tests.model.test_torch_compile import assert_same, train

RECIPES: dict[str, Any] = {
    "int8": "int8",
    "4 bits": "w4a4",
    "16 bits": "a16w8",
    "layers only": {"joins": False, "outputs": False},
    "learned": {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_ranges_and_gradients_are_the_same_to_the_bit(name: str, recipe: str) -> None:
    fast, x = NETWORKS[name][0](), inputs_for(name)
    compact = copy.deepcopy(fast)
    prepare(fast, RECIPES[recipe], x)
    prepare(compact, RECIPES[recipe], x, memory="compact")
    batches = [inputs_for(name) for _ in range(2)]
    assert_same(train(compact, compact, batches), train(fast, fast, batches))


class Stack(nn.Module):
    """Convolutions, each with batch norm and relu."""

    def __init__(self, depth: int = 8, relu: nn.Module | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(depth):
            conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(16), relu or nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x)
        return result


def kept(model: nn.Module, x: Tensor) -> int:
    besides = [*model.parameters(), *model.buffers()]
    return bytes_for_backward(model(x).sum(), besides)


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Hardtanh(0, 6)])
def test_less_is_kept_than_in_float_training(relu: nn.Module) -> None:
    model, x = Stack(8, relu).train(), torch.randn(8, 16, 24, 24)
    in_float = kept(model, x)
    prepare(model, "int8", x, memory="compact")
    model.train()(x)
    elements = x.numel()
    # Per layer batch norm keeps its input (4 bytes), the convolution integers (1), relu and the
    # quantizer a bit each; in float the convolution keeps 4. Weights are kept as integers, too.
    assert kept(model, x) < 8 * 1.02 * (4 + 1 + 2 / 8) * elements
    assert kept(model, x) < 0.68 * in_float


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(64, 1), (4000, 64)),
        (nn.Conv1d(8, 1, 3), (10, 8, 800)),
        (nn.ConvTranspose2d(8, 1, 1), (10, 8, 20, 40)),
    ],
)
def test_layers_without_joins_keep_integers(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, x = nn.Sequential(layer), torch.randn(shape)
    prepare(model, {"joins": False, "outputs": False}, memory="compact")
    model(x)
    assert x.numel() <= kept(model, x) < 1.1 * x.numel()


@pytest.mark.parametrize("join", [lambda x: F.avg_pool1d(x, 2), lambda x: x @ x.mT, F.silu])
def test_joins_keep_integers(join: Any) -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = join(self.scale.weight * x).sum((0, 1))
            return result

    model, x = Joined(), torch.randn(1000, 2, 64)
    prepare(model, "int8", x, memory="compact")
    model.train()(x)
    # The integers of the product's operand and of the join's, and a bit for the gradient of this.
    assert kept(model, x) < 1.1 * (2 + 1 / 8) * x.numel()


def test_fast_keeps_more() -> None:
    """The tests above would not see it if both were the same."""
    fast, x = Stack().train(), torch.randn(8, 16, 24, 24)
    compact = copy.deepcopy(fast)
    for model in (fast, compact):
        prepare(model, "int8", x, memory="fast" if model is fast else "compact")
        model.train()(x)
    assert kept(fast, x) > 1.5 * kept(compact, x)


def test_a_tensor_with_two_readers_is_kept_once() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 4), nn.Linear(64, 4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.a(x) + self.b(x)
            return result

    model, x = Branches(), torch.randn(1000, 64)
    prepare(model, "int8", x, memory="compact")
    model.train()(x)
    # Of its 64,000 elements, besides the sums of 4,000.
    assert 64_000 <= kept(model, x) < 70_000


def test_evaluation_keeps_nothing_for_readers_to_come() -> None:
    """What a forward without gradients has quantized dies with what it was made of."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.alive: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            inner = weakref.ref(x)
            x = self.b(x)
            self.alive.append(inner() is not None)
            return x

    model, x = Chain(), torch.randn(3, 4)
    prepare(model, "int8", x)
    model.eval()
    with torch.no_grad():
        model(x)
    assert model.alive[-1] is False


def test_checkpointed_activations_have_the_same_gradients() -> None:
    class Checkpointed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    plain, x = Stack(3), torch.randn(2, 16, 6, 6)
    again = Checkpointed(3)
    again.load_state_dict(plain.state_dict())
    for model in (plain, again):
        prepare(model, "int8", x, memory="compact")
    assert_same(train(again, again, [x]), train(plain, plain, [x]))


def test_second_derivatives_pass_through() -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)), torch.randn(4, 6)
    gradients = []
    for memory in ("fast", "compact"):
        twin = copy.deepcopy(model)
        prepare(twin, "int8", x, memory=memory)  # type: ignore[arg-type]
        twin.train()(x)
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(twin(leaf).square().sum(), leaf, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), list(twin.parameters())[:1]))
    assert_same(*gradients)


def test_nan_comes_out_as_nan() -> None:
    x = torch.tensor([1.0, torch.nan], requires_grad=True)
    scale, zero_point = torch.tensor(0.1), torch.tensor(3.0)
    y = fake_quantize(x, scale, zero_point, IntegerGrid(-128, 127), carries_int_repr=True)
    assert torch.equal(y.isnan(), torch.tensor([False, True]))


@pytest.mark.parametrize("function", [F.relu, torch.relu, Tensor.relu, F.relu6, F.hardtanh])
@pytest.mark.parametrize("layout", ["plain", "channels last", "sliced"])
def test_activations_have_the_values_and_gradients_of_torch(function: Any, layout: str) -> None:
    x = torch.randn(3, 5, 7, 7) * 4
    x[0, 0, 0, :3] = torch.tensor([0.0, 6.0, -1.0])
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        x = x[:, ::2, 1:, :5]
    upstream, gradients, results = torch.randn(x.shape), [], []
    for call in (function, lambda leaf: compactly(function, leaf)):
        leaf = x.detach().clone().requires_grad_()
        results.append(call(leaf))
        results[-1].backward(upstream)
        gradients.append(leaf.grad)
    assert_same(*results)
    assert_same(*gradients)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (3, 11), (2, 3, 5, 7)])
def test_bits_come_back_as_they_were(shape: tuple[int, ...]) -> None:
    flags = (torch.rand(shape) < 0.5).to(torch.int8)
    packed = pack_bits(flags)
    assert packed.numel() == 64 * -(-flags.numel() // 512)
    assert torch.equal(unpack_bits(packed, flags.shape, flags.stride()), flags)


def test_another_word_for_memory_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="memory must be 'fast' or 'compact'; got 'small'"):
        prepare(model, memory="small")  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear
