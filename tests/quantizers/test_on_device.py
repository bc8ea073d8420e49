"""Quantizers on a GPU, by Triton's interpreter, beside the same quantizers on a CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.numerics.gpu.launch import count_launches
from lightning_qat.numerics.int_repr import int_repr_of
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.factory import activation_quantizer, weight_quantizer
from lightning_qat.quantizers.learned_activation import LOOKS_EVERY, LearnedActivation
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.quantizers.weight_cache import WeightGroup
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec
from lightning_qat.training.phases import set_compact
from lightning_qat.training.range_sync import activation_quantizers
from tests.join_networks import NETWORKS, inputs_for
from tests.numerics.interpreter import interpreted

SPECS: dict[str, dict[str, Any]] = {
    "affine": {},
    "symmetric": {"symmetric": True},
    "from zero": {"fixed_min": True},
    "4 bits": {"bits": 4},
    "16 bits": {"bits": 16, "symmetric": True},
}
CLAMPS = {"none": None, "relu": (0.0, math.inf), "relu6": (0.0, 6.0), "inside": (0.0, 1.5)}


def calibrated(**spec: Any) -> ActivationQuantizer:
    """A quantizer that knows a range, which more values than the first batch's lie outside of."""
    torch.manual_seed(0)
    quantizer = activation_quantizer(ActivationSpec(**spec)).train()
    quantizer(torch.randn(3, 7, 50) * 2)
    quantizer.deferred = True
    if isinstance(quantizer, LearnedActivation):
        for _ in range(LOOKS_EVERY):
            quantizer.count_batch()
    return quantizer


def step(quantizer: ActivationQuantizer, x: Tensor, clamp: tuple[float, float] | None) -> Any:
    """The result, its gradient, the range that was seen, and the parameters' gradients."""
    x, seen = x.detach().clone().requires_grad_(), None
    if clamp is None:
        y = quantizer(x)
        seen = quantizer.pending
    else:
        found = quantizer.quantize_clamped(x, clamp)
        assert found is not None
        y, seen = found
    y.backward(torch.linspace(0.5, 1.5, y.numel()).view(y.shape))
    return (y.detach(), x.grad, seen), [p.grad for p in quantizer.parameters()]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["observed", "learned", "ulq"])
def test_a_step_of_an_activation_quantizer(kind: Any, spec: str, clamp: str) -> None:
    """Values, gradients and range to the bit; gradients of what is learned are sums."""
    quantizer = calibrated(quantizer=kind, **SPECS[spec])
    twin, x = copy.deepcopy(quantizer), torch.randn(3, 7, 500) * 3
    on_cpu, learned = step(quantizer, x, CLAMPS[clamp])
    with interpreted(), count_launches() as launches:
        on_device, also_learned = step(twin, x, CLAMPS[clamp])
    torch.testing.assert_close(on_device, on_cpu, rtol=0, atol=0)
    torch.testing.assert_close(also_learned, learned, rtol=2e-3, atol=1e-4)
    backward = ["masked"] if kind == "observed" else ["learned_backward", "learned_finish"]
    assert [launch.kernel for launch in launches] == ["fake_quantize", *backward]


def test_kernels_read_the_range_itself() -> None:
    """Whoever changes a range, and however: the next forward has its scale."""
    quantizer, x = calibrated().eval(), torch.linspace(-3, 3, 100)
    with interpreted():
        quantizer(x)
        quantizer.min_val.data.fill_(-1.28)
        quantizer.max_val.data.fill_(1.27)
        y = quantizer(x)
    assert y.min() == pytest.approx(-1.28)
    assert y.max() == pytest.approx(1.27)


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(3, 8, 3),
    "channels last": lambda: nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "depthwise": lambda: nn.Conv2d(8, 8, 3, groups=8),
    "linear": lambda: nn.Linear(1500, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "one dimension": lambda: nn.Conv1d(3, 5, 4),
}


def quantizers_of(spec: WeightSpec) -> list[tuple[WeightQuantizer, Tensor]]:
    torch.manual_seed(0)
    found = []
    for make in WEIGHTS.values():
        layer: Any = make()
        transposed = isinstance(layer, nn.ConvTranspose2d)
        groups = layer.groups if transposed else 1
        axis = 1 if transposed else 0
        channels = layer.weight.shape[axis] * groups
        found.append((weight_quantizer(spec, axis, channels, groups).train(), layer.weight))
    # A channel of zeros, and one that training has lost.
    with torch.no_grad():
        found[0][1][1] = 0.0
        found[0][1][2, 0, 0, 0] = math.nan
        found[3][1][0, :5] = torch.tensor([1e-42, -0.0, 0.5, -0.5, 2.0])
    return found


# Every pair of values of any two; a launch takes a program per channel, and a second to interpret.
@pytest.mark.parametrize(
    ("rule", "granularity", "bits", "compact"),
    [
        ("minmax", "per_channel", 8, False),
        ("minmax", "per_channel", 4, True),
        ("minmax", "per_tensor", 8, True),
        ("minmax", "per_tensor", 2, False),
        ("arq", "per_channel", 8, False),
        ("arq", "per_channel", 2, True),
        ("arq", "per_tensor", 4, False),
    ],
)
def test_all_weights_in_two_launches(rule: Any, granularity: Any, bits: int, compact: bool) -> None:
    """Every layout of a weight, together: to the bit what each of them is by itself on a CPU."""
    spec = WeightSpec(bits=bits, granularity=granularity, quantizer=rule)
    members, group = quantizers_of(spec), WeightGroup()
    for quantizer, _ in members:
        quantizer.compact = compact
    expected = [quantizer(weight) for quantizer, weight in members]
    with interpreted():
        for _ in range(2):  # A weight joins when it has been seen twice.
            for quantizer, weight in members:
                quantizer.group = group
                quantizer(weight)
        with count_launches() as launches:
            found = [quantizer(weight) for quantizer, weight in members]
        assert [launch.kernel for launch in launches] == ["weight_ranges", "quantize_weights"]
        for y, other, (_, weight) in zip(found, expected, members, strict=True):
            torch.testing.assert_close(y, other, rtol=0, atol=0, equal_nan=True)
            assert y.stride() == weight.stride()
            kept = int_repr_of(y)
            assert (kept is not None) == compact
            if kept is not None:
                finite = other.isfinite()
                assert torch.equal(kept.restore()[finite], other[finite])
    weight = members[3][1]
    found[3].sum().backward()
    assert weight.grad is not None
    assert bool((weight.grad == 1).all())


def test_a_weight_that_changes_is_quantized_anew() -> None:
    """In place, by another tensor, and when it is used a second time after that."""
    group, layers = WeightGroup(), [nn.Linear(4, 4), nn.Linear(4, 4)]
    quantizers = [weight_quantizer(WeightSpec(), 0, 4) for _ in layers]

    def weights() -> list[Tensor]:
        return [q(layer.weight) for q, layer in zip(quantizers, layers, strict=True)]

    with interpreted():
        before = weights()
        for quantizer in quantizers:
            quantizer.group = group
        for after in (weights(), weights()):
            assert all(map(torch.equal, before, after))
        with torch.no_grad():
            layers[0].weight.mul_(2.0)
            layers[1].weight = nn.Parameter(layers[1].weight * -1.0)
        after = weights()
        assert torch.equal(after[0], before[0] * 2)
        assert torch.equal(after[1], -before[1])


def test_every_weight_is_quantized_once_in_the_first_forwards_too() -> None:
    """Their cost grows with the number of weights, not with its square; two grids do not mix."""
    layers = [nn.Linear(4, 4) for _ in range(6)]
    model = nn.Sequential(*layers).train()
    prepare(model, {"overrides": {"[135]": {"weight": {"bits": 4}}}}, torch.randn(2, 4))
    x = torch.randn(2, 4).to("meta")
    model.to("meta")
    launched = []
    for _ in range(4):
        with count_launches() as launches:
            model(x)
        launched.append(sum(launch.kernel == "quantize_weights" for launch in launches))
    assert launched == [0, 0, 2, 2]


def test_a_weight_that_is_computed_in_every_forward_joins_nobody() -> None:
    """It lies elsewhere each time, and what was computed before would be quantized for nothing."""
    group, layer = WeightGroup(), nn.Linear(4, 4)
    quantizer = weight_quantizer(WeightSpec(), 0, 4)
    once = quantizer(layer.weight)
    quantizer.group = group
    with interpreted():
        for scale in (1.0, 2.0, 4.0, 8.0):
            assert torch.equal(quantizer(layer.weight * scale), once * scale)
            assert not any(member.stays for member in group._members.values())


class Recurrent(nn.Module):
    """Two LSTM layers, a GRU and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, batch_first=True)
        self.gru = nn.GRU(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(self.lstm(x)[0])[0])
        return y


class Attention(nn.Module):
    """A table, attention, a sum and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        y: Tensor = self.head(x + self.attention(x, x, x, need_weights=False)[0])
        return y


OTHERS: dict[str, Callable[[], nn.Module]] = {"recurrent": Recurrent, "attention": Attention}


@pytest.mark.parametrize(
    ("name", "recipe", "memory"),
    [
        ("recurrent", "int8", "compact"),
        ("attention", "int8", "fast"),
        ("attention", "amct", "compact"),
        ("mobilenet_v3_block", "int8", "fast"),
        ("mobilenet_v3_block", "amct", "compact"),
        ("dense_block", "int8", "compact"),
        ("dense_block", "w4a4", "fast"),
    ],
)
def test_models_train_to_the_same_gradients(name: str, recipe: str, memory: str) -> None:
    """Batches of a model in a plain loop: outputs, gradients and ranges of kernels and of loops."""
    torch.manual_seed(0)
    make = OTHERS[name] if name in OTHERS else NETWORKS[name][0]
    model, x = make().train(), torch.randn(2, 4, 6) if name in OTHERS else inputs_for(name)
    prepare(model, recipe, x)
    set_compact(model, memory == "compact")
    twin = copy.deepcopy(model)

    def train(net: nn.Module) -> Any:
        for batch in range(3):
            net.zero_grad()
            y = net(x * (1 + batch))
            y.square().mean().backward()
        grads = {name: p.grad for name, p in net.named_parameters()}
        ranges = {n: (q.min_val, q.max_val) for n, q in activation_quantizers(net).items()}
        return y.detach(), grads, ranges

    on_cpu = train(model)
    with interpreted(), count_launches() as launches:
        on_device = train(twin)
    kernels = {launch.kernel for launch in launches}
    assert kernels >= {"fake_quantize", "masked" if recipe == "int8" else "learned_backward"}
    torch.testing.assert_close(on_device, on_cpu, rtol=1e-5, atol=1e-6)


def test_a_tensor_on_another_device_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    prepare(model, "int8", x)
    model(x)
    for quantizer in activation_quantizers(model).values():
        quantizer.to("meta")
    with pytest.raises(RuntimeError, match="the input of '0' is on cpu, its quantizer on meta"):
        model(x)


def test_a_number_of_the_cpu_is_taken_along() -> None:
    """As torch's own operations do: ``x * torch.tensor(0.5)`` works on every device."""
    quantizer = calibrated().eval().to("meta")
    assert quantizer(torch.tensor(0.5)).device.type == "meta"
