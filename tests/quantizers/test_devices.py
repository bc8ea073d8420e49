"""Values, gradients and ranges are the formula's to the bit on every device and in every dtype."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.numerics.int_repr import int_repr_of
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.factory import activation_quantizer
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import ActivationSpec, WeightSpec

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

on_every_device = pytest.mark.parametrize("device", DEVICES)
in_every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def awkward(dtype: torch.dtype, step: float) -> Tensor:
    """Ties, ends of the grid, subnormals, and what is no number, in a random crowd."""
    x = torch.randn(4_003) * 100 * step
    x[:700] = torch.arange(-175.0, 175.0, 0.5) * step
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 6e-8, 6e4, -6e4]
    x[-len(special) :] = torch.tensor(special)
    return x.to(dtype)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def quantizer_of(spec: ActivationSpec, device: str) -> ActivationQuantizer:
    return activation_quantizer(spec).to(device)


SPECS = {
    # Steps of 1/4: every tie is exact.
    "affine": ActivationSpec(clip=(-31.75, 32.0)),
    # Steps of no power of two: a product with the reciprocal would round some of them elsewhere.
    "other steps": ActivationSpec(clip=(-1.0, 1.55)),
    "one side": ActivationSpec(clip=(0.0, 6.0)),
    "symmetric": ActivationSpec(symmetric=True, clip=(-3.1, 2.0)),
    "4 bits": ActivationSpec(bits=4, clip=(-1.0, 1.55)),
    "16 bits": ActivationSpec(bits=16, symmetric=True, clip=(-3.1, 2.0)),
    "learned": ActivationSpec(quantizer="learned", clip=(-1.0, 1.55)),
    "learned, symmetric": ActivationSpec(quantizer="learned", symmetric=True, clip=(-3.1, 2.0)),
    "ulq": ActivationSpec(quantizer="ulq", clip=(-1.0, 1.55)),
}


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_an_activation_is_rounded_as_the_formula_says(
    name: str, compact: bool, dtype: torch.dtype, device: str
) -> None:
    expected, quantizer = quantizer_of(SPECS[name], "cpu"), quantizer_of(SPECS[name], device)
    quantizer.compact = compact
    scale, zero_point = expected.scale_and_zero_point()
    for found, known in zip(quantizer.scale_and_zero_point(), (scale, zero_point), strict=True):
        same(found.cpu(), known)
    x, upstream = awkward(dtype, float(scale)), torch.rand(4_003).to(dtype)
    leaf = x.to(device).requires_grad_()
    y = quantizer(leaf)
    y.backward(upstream.to(device))

    qmin, qmax = expected.grid.qmin, expected.grid.qmax
    steps = torch.round(x.float() / scale) + zero_point
    wanted = (steps.clamp(qmin, qmax) - zero_point) * scale
    same(y.detach().cpu(), wanted.to(dtype))
    inside = (steps >= qmin) & (steps <= qmax)
    assert leaf.grad is not None
    number = ~x.isnan()  # a gradient there is nobody's
    same(leaf.grad.cpu()[number], (upstream * inside)[number])
    int_repr = int_repr_of(y)
    if int_repr is not None:
        finite = x.isfinite()  # no integer stands for NaN
        same(int_repr.restore().to(dtype).cpu()[finite], wanted.to(dtype)[finite])


@on_every_device
@pytest.mark.parametrize("name", ["learned", "learned, symmetric", "ulq"])
def test_what_is_learned_gets_the_same_gradient(name: str, device: str) -> None:
    x, upstream = torch.randn(5_000), torch.randn(5_000)

    def gradients(device: str) -> list[Tensor]:
        quantizer = quantizer_of(SPECS[name], device)
        quantizer(x.to(device)).backward(upstream.to(device))
        return [p.grad.cpu() for p in quantizer.parameters() if p.grad is not None]

    found, wanted = gradients(device), gradients("cpu")
    assert len(found) == len(wanted) > 0
    # Five thousand terms of size one, in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@on_every_device
@in_every_dtype
def test_an_observed_range_is_that_of_the_values(dtype: torch.dtype, device: str) -> None:
    quantizer = quantizer_of(ActivationSpec(), device)
    quantizer.deferred = True
    batches = [torch.randn(3, 1_001).to(dtype), 3 * torch.randn(7).to(dtype)]
    for number, x in enumerate(batches):
        # The second one passes through a quantizer that rounds at the same time.
        quantizer(x.to(device))
        assert quantizer.pending is not None
        assert quantizer.pending.tolist() == [-float(x.min()), float(x.max())]
        if not number:
            quantizer.commit(quantizer.pending)
    assert quantizer(torch.empty(0, 3, dtype=dtype, device=device)).shape == (0, 3)


LAYOUTS: dict[str, Any] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "every other": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, -1, -1, -1),
}


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_changes_a_value(layout: str, dtype: torch.dtype, device: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 6, 5, 4).to(dtype).to(device))
    quantizer = quantizer_of(SPECS["other steps"], device)
    leaf = x.detach().requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    other = x.contiguous().requires_grad_()
    wanted = quantizer(other)
    wanted.sum().backward()
    same(y, wanted)
    assert leaf.grad is not None
    assert other.grad is not None
    same(leaf.grad, other.grad)
    if layout == "channels_last":
        # A convolution after it would copy any other.
        assert y.is_contiguous(memory_format=torch.channels_last)


@on_every_device
@in_every_dtype
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_is_rounded_as_the_formula_says(
    bits: int, granularity: Any, dtype: torch.dtype, device: str
) -> None:
    weight = torch.randn(9, 5, 3, 3)
    weight[3] = 0.0  # pruned
    weight[5] *= 1e-3
    weight = weight.to(dtype)
    quantizer = WeightQuantizer(WeightSpec(bits=bits, granularity=granularity), 0).to(device)
    leaf = weight.to(device).requires_grad_()
    y = quantizer(leaf)
    y.sum().backward()
    qparams = quantizer.qparams(weight)  # on the CPU
    grid = quantizer.grid
    axes = (1, 2, 3) if granularity == "per_channel" else (0, 1, 2, 3)
    largest = weight.float().abs().amax(axes, keepdim=True)
    scale = qparams.scale.reshape(largest.shape)
    used = largest > 0
    # (qmax - qmin) / 2 steps for the largest value, in float32.
    wanted_scale = largest / ((grid.qmax - grid.qmin) / 2)
    torch.testing.assert_close(scale[used], wanted_scale[used], rtol=2e-7, atol=0)
    same(quantizer.qparams(weight.to(device)).scale, qparams.scale)
    wanted = torch.round(weight.float() / scale).clamp(grid.qmin, grid.qmax) * scale
    same(y.detach().cpu(), wanted.to(dtype))
    assert leaf.grad is not None
    assert bool((leaf.grad == 1).all())


class Clamps(nn.Module):
    """Relu and relu6 before joins; products of a layer go elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(x * 2.0) + F.relu6(x + 1.0)
        return torch.cat([y, x], 1), self.head(x)


@on_every_device
@pytest.mark.parametrize("memory", ["fast", "compact"])
def test_clamps_and_joins_have_the_values_of_the_cpu(memory: Any, device: str) -> None:
    batches = [torch.randn(6, 5) for _ in range(3)]

    def results(device: str) -> list[Tensor]:
        torch.manual_seed(1)
        model = Clamps().to(device)
        prepare(model, "int8", batches[0].to(device), memory)
        found = []
        # From the third forward on a relu and its quantizer are one pass where that is known.
        for x in [*batches, *batches]:
            leaf = x.to(device).requires_grad_()
            joined, _ = model(leaf)
            joined.sum().backward()
            assert leaf.grad is not None
            found += [joined.detach().cpu(), leaf.grad.cpu()]
        return found

    # Moving averages may be an ulp apart, hence a scale, hence a value.
    for found, wanted in zip(results(device), results("cpu"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
