"""Compiled loops and torch's operations give the same numbers; either is taken where it fits."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_qat import prepare
from lightning_qat.numerics.bitmask import masked, pack_between, unpack_bits
from lightning_qat.numerics.fake_quantize import clamp_and_quantize, fake_quantize, fake_quantizer
from lightning_qat.numerics.int_repr import int_repr_of
from lightning_qat.numerics.kernels import build, loops
from lightning_qat.numerics.learned_fake_quantize import (
    learned_fake_quantize,
    learned_fake_quantizer,
)
from lightning_qat.numerics.min_max import batch_range, channel_ranges
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.training.range_sync import activation_quantizers
from tests.join_networks import NETWORKS, inputs_for

pytestmark = pytest.mark.skipif(
    build.compiled_loops() is None, reason="no C compiler with OpenMP on this machine"
)


@pytest.fixture
def separately(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Call a function with torch's operations instead of loops."""

    def call(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(loops, "compiled_loops", lambda: None)
            return function()

    return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the loops that have run."""
    names, call = [], loops._call
    monkeypatch.setattr(loops, "_call", lambda *args: (names.append(args[0]), call(*args))[1])
    return names


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def awkward(count: int = 40_007) -> Tensor:
    """Ties, ends, what is no number, and more values than one thread takes at once."""
    torch.manual_seed(0)
    x = torch.randn(count) * 8
    ties = torch.arange(-300.0, 300.0) / 8
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, -3.4e38]
    x[: len(ties)] = ties
    x[-len(special) :] = torch.tensor(special)
    return x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": lambda x: x,
    "a number": lambda x: x[3],
    "empty": lambda x: x[:0],
    "images": lambda x: x[:30_000].view(10, 30, 10, 10),
    "channels last": lambda x: (
        x[:30_000].view(10, 30, 10, 10).to(memory_format=torch.channels_last)
    ),
    "transposed": lambda x: x[:30_000].view(10, 300, 10).transpose(1, 2),
    "every other": lambda x: x[::2],
    "expanded": lambda x: x[:50, None].expand(50, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "grid",
    [
        IntegerGrid(-128, 127),
        IntegerGrid(-127, 127),
        IntegerGrid(0, 15),
        IntegerGrid(-32768, 32767),
    ],
)
@pytest.mark.parametrize("zero_point", [0.0, 3.0])
@pytest.mark.parametrize("keeps", ["input", "bits", "codes"])
def test_values_and_gradients_are_the_same_to_the_bit(
    layout: str, grid: IntegerGrid, zero_point: float, keeps: str, separately: Any
) -> None:
    start = LAYOUTS[layout](awkward())
    upstream = torch.rand(start.shape) + 0.5

    def results() -> Any:
        x = start.detach().requires_grad_()
        y = fake_quantize(
            *(x, torch.tensor(0.25), torch.tensor(zero_point), grid),
            saves_input=keeps == "input",
            carries_int_repr=keeps == "codes",
        )
        int_repr = int_repr_of(y)
        assert (int_repr is not None) == (keeps == "codes")
        return y.detach(), torch.autograd.grad(y, x, upstream), int_repr and int_repr.restore()

    one, other = results(), separately(results)
    assert_same(one[0], other[0])
    if keeps == "codes":
        finite = one[0].isfinite()  # No integer stands for NaN.
        assert_same(one[2][finite], other[2][finite])
    # A gradient at NaN is nobody's.
    number = ~start.isnan()
    assert_same(one[1][0][number], other[1][0][number])


@pytest.mark.parametrize("shape", [(64, 3, 7, 7), (1000, 9), (3, 20_011), (5,)])
@pytest.mark.parametrize("int_repr", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_rows_have_scales_of_their_own(
    shape: tuple[int, ...], int_repr: bool, channels_last: bool, separately: Any, calls: list[str]
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    if channels_last and weight.dim() == 4:
        weight = weight.to(memory_format=torch.channels_last)
    scale = (torch.rand(shape[0]) / 10 + 0.01).view(-1, *[1] * (weight.dim() - 1))

    def results() -> Tensor:
        return fake_quantize(
            *(weight, scale, torch.tensor(0.0), IntegerGrid(-127, 127)),
            gradient_everywhere=True,
            carries_int_repr=int_repr,
        )

    one = results()
    assert calls == ["fake_quantize"]
    other = separately(results)
    assert_same(one, other)
    if int_repr:
        found, expected = int_repr_of(one), int_repr_of(other)
        assert found is not None
        assert expected is not None
        assert_same(found.restore(), expected.restore())


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_ranges_are_the_same(axis: int | None, separately: Any) -> None:
    x = awkward(40_000)
    for part in (x, x[:39_000], x.view(40, 1000), x[:39_000].view(30, 1300)):
        for ends in (None, (0.0, 6.0)):
            find = partial(batch_range, part, ends=ends)
            assert_same(find(), separately(find))
        if part.dim() > 1:
            find = partial(channel_ranges, part, axis)
            assert_same(find(), separately(find))


def test_a_range_is_seen_in_the_pass_that_quantizes(calls: list[str], separately: Any) -> None:
    x = awkward(40_000)[:-9].requires_grad_()
    numbers = torch.tensor(0.25), torch.tensor(0.0), IntegerGrid(-128, 127)
    seen: list[Tensor] = []
    y = fake_quantize(x, *numbers, saves_input=True, observe=seen.append)
    z = clamp_and_quantize(x, (0.0, 6.0), *numbers, observe=seen.append)
    assert calls == ["fake_quantize"] * 2
    assert_same(seen[0], torch.stack((-x.min(), x.max())))
    assert_same(seen[1], torch.tensor([-0.0, 6.0]))
    assert_same(y, separately(lambda: fake_quantize(x, *numbers, saves_input=True)))
    assert_same(z, separately(lambda: clamp_and_quantize(x, (0.0, 6.0), *numbers)))


@pytest.mark.parametrize("count", [1, 7, 511, 512, 513, 40_007])
@pytest.mark.parametrize("ends", [(0.0, math.inf), (-1.0, 6.0), (2.0, 1.0)])
def test_bits_are_laid_out_alike(count: int, ends: tuple[float, float], separately: Any) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(count) * 4, torch.randn(count)
    x[::5] = ends[0]
    one, other = pack_between(x, *ends), separately(lambda: pack_between(x, *ends))
    expected = (x > ends[0]) & (x < ends[1])
    for bits in (one, other):
        assert_same(unpack_bits(bits, x.shape, x.stride()).bool(), expected)
        with torch.no_grad():
            for gradient in (grad, grad.repeat_interleave(2)[::2]):
                found = masked(gradient, bits, x.shape, x.stride())
                assert_same(found, torch.where(expected, grad, 0.0))


GRIDS: dict[str, Any] = {
    "scale": (IntegerGrid(-8, 7), None, None),
    "from zero": (IntegerGrid(0, 15), 0.0, None),
    "ends": (IntegerGrid(-8, 7), -3.0, None),
    "channels": (IntegerGrid(-7, 7), None, 0),
}


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("layout", ["plain", "every other"])
def test_learned_grids_have_the_gradients_of_double_precision(
    kind: str, layout: str, separately: Any
) -> None:
    """LSQ's and LSQ+'s formulas; a sum is as good as 1e-6 of its absolute terms."""
    torch.manual_seed(0)
    grid, lower, axis = GRIDS[kind]
    start = torch.randn(6, 8002) * 4
    upstream = torch.randn(6, 8002)
    if layout == "every other":
        start, upstream = start[:, ::2], upstream[:, ::2]
    steps = torch.full((6,) if axis == 0 else (), 0.37)

    def results() -> Any:
        x, scale = start.detach().requires_grad_(), steps.clone().requires_grad_()
        low = None if lower is None else torch.tensor(lower, requires_grad=True)
        y = learned_fake_quantize(x, scale, low, grid, axis=axis, normalized=False)
        leaves = (x, scale) if low is None else (x, scale, low)
        return y.detach(), torch.autograd.grad(y, leaves, upstream)

    (y, found), (y2, found2) = results(), separately(results)
    assert_same(y, y2)
    assert_same(found[0], found2[0])
    x, g, scale = start.double(), upstream.double(), float(steps.flatten()[0])
    zero = 0 if lower is None else round(grid.qmin - lower / scale)
    low, high = grid.qmin - zero, grid.qmax - zero
    rounded = torch.round(start / steps.flatten()[0]).double()
    below, above = rounded < low, rounded > high
    inner = rounded - x / scale
    if lower is None:
        terms = torch.where(below, low, torch.where(above, high, inner))
    else:
        terms = torch.where(below, 0, torch.where(above, grid.qmax - grid.qmin, inner))
    over = (1,) if axis == 0 else (0, 1)
    for gradients in (found, found2):
        assert_same(gradients[0], upstream * ~(below | above))
        error = (gradients[1].double() - (terms * g).sum(over)).abs()
        assert bool((error <= 1e-6 * (terms * g).abs().sum(over)).all())
        if lower is not None:
            outside = (g * (below | above)).sum()
            assert abs(float(gradients[2] - outside)) <= 1e-6 * float(g.abs().sum())


def test_sums_are_the_same_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    x, upstream, before = torch.randn(200_003), torch.randn(200_003), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale = torch.tensor(0.02, requires_grad=True)
            learned_fake_quantize(x, scale, None, IntegerGrid(-128, 127)).backward(upstream)
            found.append(scale.grad)
    finally:
        torch.set_num_threads(before)
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@pytest.mark.parametrize("low", [None, -0.9, 0.0])
@pytest.mark.parametrize("ends", [(0.0, math.inf), (0.0, 6.0), (0.0, 0.9)])
def test_a_clamped_learned_grid_is_that_of_two_passes(
    low: float | None, ends: tuple[float, float], separately: Any
) -> None:
    torch.manual_seed(0)
    start, upstream, grid = torch.randn(5000) * 3, torch.randn(5000), IntegerGrid(-8, 7)

    def results(clamped: bool) -> Any:
        x, scale = start.detach().requires_grad_(), torch.tensor(0.3, requires_grad=True)
        lowest = None if low is None else torch.tensor(low, requires_grad=True)
        quantize = learned_fake_quantizer(
            *(scale, lowest, grid, 5000), saves_input=True, clamped=ends if clamped else None
        )
        y = quantize(x if clamped else x.clamp(*ends))
        leaves = (x, scale) if lowest is None else (x, scale, lowest)
        return y.detach(), *torch.autograd.grad(y, leaves, upstream)

    expected = separately(lambda: results(clamped=False))
    for found in (results(clamped=True), separately(lambda: results(clamped=True))):
        assert_same(found[0], expected[0])
        assert_same(found[1], expected[1])
        torch.testing.assert_close(found[2:], expected[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int8", "w4a4", "learned"])
@pytest.mark.parametrize("memory", ["fast", "compact"])
@pytest.mark.parametrize("network", ["resnet8", "mobilenet_v2", "encoder_block", "inception"])
def test_a_step_of_training_is_the_same(
    network: str, recipe: Any, memory: Any, separately: Any
) -> None:
    if recipe == "learned":
        recipe = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}
    torch.manual_seed(0)
    model, x = NETWORKS[network][0](), inputs_for(network)
    prepare(model, recipe, x, memory)
    for quantizer in activation_quantizers(model).values():
        quantizer.deferred = True
        quantizer.observing = True
    twin = copy.deepcopy(model)

    def results(model: nn.Module) -> Any:
        model.train()
        torch.manual_seed(1)  # dropout
        for _ in range(3):  # Relu and quantizer become one pass once they are known.
            y = model(x)
            for quantizer in activation_quantizers(model).values():
                if quantizer.pending is not None:
                    quantizer.commit(quantizer.pending)
        y.square().sum().backward()
        return y.detach(), {name: p.grad for name, p in model.named_parameters()}

    (y, found), (y2, expected) = results(model), separately(lambda: results(twin))
    assert_same(y, y2)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_what_the_loops_do_not_know_is_left_to_torch(calls: list[str]) -> None:
    x, scale = torch.randn(3, 8), torch.tensor(0.1)

    class Other(Tensor):
        pass

    unknown = [
        *(x.double(), x.half(), x[:, ::2], x[:1].expand(3, 8), x[:0], x.to("meta")),
        x.as_subclass(Other),
        torch._efficientzerotensor((3, 8)),
    ]
    for tensor in unknown:
        assert loops.fake_quantize(tensor, scale, -8.0, 7.0) is None
        assert loops.value_range(tensor) is None
    assert loops.fake_quantize(x, torch.rand(8), -8.0, 7.0) is None
    assert loops.fake_quantize(x, torch.rand(1, 8), -8.0, 7.0) is None
    assert loops.fake_quantize(x, scale.double(), -8.0, 7.0) is None
    assert loops.fake_quantize(x.t(), torch.rand(8, 1), -8.0, 7.0) is None
    assert calls == []


def test_the_steps_of_a_sequence_are_one_loop_each(calls: list[str]) -> None:
    quantize = fake_quantizer(torch.tensor(0.1), torch.tensor(0.0), IntegerGrid(-128, 127))
    for _ in range(3):
        quantize(torch.randn(4, 5))
    assert calls == ["fake_quantize"] * 3


@pytest.mark.parametrize(
    ("compiler", "why"),
    [
        ("there-is-no-such-compiler", "no C compiler was found (looked for there-is-no-such"),
        ("false", "false could not compile loops.c: it said nothing"),
        ("gcc -Drow=1", "error: "),  # Its first line only says where.
        ("true", "true could not compile loops.c: it said nothing"),
    ],
)
def test_without_a_compiler_a_line_says_what_to_do(
    compiler: str, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.INFO):
        assert build.compiled_loops.__wrapped__() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert why in record.getMessage()
    assert "Install gcc, or name a C compiler with OpenMP" in record.getMessage()


def test_the_compiler_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO):
        assert build.compiled_loops.__wrapped__() is not None
    (record,) = caplog.records
    assert "has compiled" in record.getMessage()
    assert record.levelno == logging.INFO
