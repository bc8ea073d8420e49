"""Each Triton kernel, run by the interpreter, beside the operations whose numbers it has."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.numerics.arithmetic import range_qparams, zero_point_of
from lightning_qat.numerics.fake_quantize import clamp_and_quantize, fake_quantize
from lightning_qat.numerics.gpu import activations as gpu
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import count_launches
from lightning_qat.numerics.gpu.learned import learned_fake_quantize as learned_on_device
from lightning_qat.numerics.gpu.straight_through import quantize_on_device
from lightning_qat.numerics.int_repr import int_repr_of, saving_int_repr
from lightning_qat.numerics.kernels import loops
from lightning_qat.numerics.min_max import batch_range
from lightning_qat.numerics.qparams import IntegerGrid
from tests.numerics.interpreter import interpreted
from tests.numerics.test_kernels import LAYOUTS, assert_same, awkward

GRIDS = {
    "int8": IntegerGrid(-128, 127),
    "weight": IntegerGrid(-127, 127),
    "4 bits": IntegerGrid(-8, 7),
    "16 bits": IntegerGrid(-32768, 32767),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with interpreted():
        yield


def by_operations(compute: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The result without kernels and without compiled loops."""
    with monkeypatch.context() as patch:
        patch.setattr("lightning_qat.numerics.gpu.launch.INTERPRETED", False)
        patch.setattr(loops, "compiled_loops", lambda: None)
        return compute()


def values(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Awkward ones, in a layout of memory."""
    return LAYOUTS[layout](torch.cat([awkward(2_000), torch.randn(30_000) * 8])).to(dtype)


@pytest.mark.parametrize(
    ("layout", "grid", "dtype"),
    [
        *[(layout, "int8", torch.float32) for layout in LAYOUTS],
        *[("images", grid, dtype) for grid in GRIDS for dtype in DTYPES],
        ("channels last", "16 bits", torch.bfloat16),
        ("every other", "4 bits", torch.float16),
    ],
)
def test_fake_quantize(
    layout: str, grid: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, integers, gradient and range are those of torch's operations, to the bit."""
    start = values(layout, dtype)
    upstream = torch.rand(start.shape).to(dtype) + 0.5
    scale, zero_point = torch.tensor(0.25), torch.tensor(3.0)

    def results() -> Any:
        seen: list[Tensor] = []
        x = start.detach().requires_grad_()
        observe = seen.append if x.numel() else None
        y = fake_quantize(x, scale, zero_point, GRIDS[grid], carries_int_repr=True, observe=observe)
        y.backward(upstream)
        kept = int_repr_of(y)
        assert kept is not None
        assert y.dtype == dtype
        assert x.grad is not None
        numbers = ~x.detach().isnan()
        return y.detach(), x.grad[numbers], kept.restore(dtype)[numbers], seen

    assert_same(results(), by_operations(results, monkeypatch))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "ends",
    [
        (-2.5, 4.0),
        (0.0, 6.0),
        (-6.0, -1.0),  # zero is always on the grid
        (0.5, 3.0),
        (0.0, 0.0),
        (-1e-40, 1e-40),  # too small for a scale
        (-1e30, 3e38),
        (math.nan, 1.0),
    ],
)
def test_the_numbers_of_a_range(ends: tuple[float, float], symmetric: bool) -> None:
    low, high, grid = torch.tensor(ends[0]), torch.tensor(ends[1]), GRIDS["int8"]
    rule = GridRule.SYMMETRIC_RANGE if symmetric else GridRule.RANGE
    found = gpu.fake_quantize(torch.zeros(1), DeviceGrid(rule, low, high, grid), keeps_codes=True)
    assert found.numbers is not None
    scale, zero_point = range_qparams(low, high, grid, symmetric)
    assert_same(found.numbers, torch.stack([scale, zero_point]).view(2, 1))


def test_the_numbers_of_a_learned_step() -> None:
    """Half a width of -64 counts as 64, 128 steps of 0.5.

    From a lower end of -3 zero lies six steps up the grid.
    """
    width, low, grid = *map(torch.tensor, (-64.0, -3.0)), GRIDS["int8"]
    rules = GridRule.HALF_WIDTH, GridRule.HALF_WIDTH_FROM_ZERO, GridRule.HALF_WIDTH_AND_LOW
    numbers = {
        rule: gpu.fake_quantize(
            torch.zeros(1), DeviceGrid(rule, width, low, grid), keeps_codes=True
        ).numbers
        for rule in rules
    }
    assert {rule: n.flatten().tolist() for rule, n in numbers.items() if n is not None} == {
        GridRule.HALF_WIDTH: [0.5, 0.0],
        GridRule.HALF_WIDTH_FROM_ZERO: [0.5, -128.0],
        GridRule.HALF_WIDTH_AND_LOW: [0.5, -122.0],
    }
    assert zero_point_of(low, torch.tensor(0.5), grid) == -122.0


def test_a_weights_grid_of_8_bits_is_half_as_wide_as_128_steps() -> None:
    grid = DeviceGrid(GridRule.HALF_WIDTH, *[torch.tensor(64.0)] * 2, IntegerGrid.weight(8))
    numbers = gpu.fake_quantize(torch.zeros(1), grid, keeps_codes=True).numbers
    assert numbers is not None
    assert numbers.flatten().tolist() == [0.5, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [(0.0, math.inf), (0.0, 6.0), (-0.25, 0.75)])
def test_clamp_and_quantize_is_two_passes(ends: tuple[float, float], dtype: torch.dtype) -> None:
    """Relu, relu6 or hardtanh and then the quantizer: values, gradient and range, to the bit."""
    start = values("images", dtype)
    upstream = torch.rand(start.shape).to(dtype) + 0.5
    numbers = torch.tensor(0.25), torch.tensor(-100.0), GRIDS["int8"]

    def two_passes(x: Tensor, observe: Any) -> Tensor:
        clamped = torch.relu(x) if ends[1] == math.inf else F.hardtanh(x, *ends)
        return fake_quantize(clamped, *numbers, observe=observe)

    def one_pass(x: Tensor, observe: Any) -> Tensor:
        return clamp_and_quantize(x, ends, *numbers, observe=observe)

    def results(quantize: Callable[[Tensor, Any], Tensor]) -> Any:
        seen: list[Tensor] = []
        x = start.nan_to_num(0.0).detach().requires_grad_()
        y = quantize(x, seen.append)
        y.backward(upstream)
        return y.detach(), x.grad, seen

    with count_launches() as launches:
        once = results(one_pass)
    assert [launch.kernel for launch in launches] == ["fake_quantize", "masked"]
    assert_same(once, results(two_passes))


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("cols", [1, 63, 64, 65, 511, 512, 513, 2047, 2048, 2049, 6000])
def test_every_size(rows: int, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(rows, cols) * 2
    scale = torch.rand(rows, 1) * 0.02 + 0.01

    def results() -> Any:
        return fake_quantize(x, scale, torch.tensor(0.0), GRIDS["weight"], gradient_everywhere=True)

    with count_launches() as launches:
        found = results()
    assert len(launches) == 1
    assert_same(found, by_operations(results, monkeypatch))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_value_range(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = values(layout)
    if x.numel():
        for given in (x, x.nan_to_num(7.0)):
            for ends in (None, (-1.0, 2.0)):
                assert_same(
                    batch_range(given, ends=ends),
                    by_operations(lambda: batch_range(given, ends=ends), monkeypatch),  # noqa: B023
                )


def test_ranges_share_the_memory_that_is_filled_for_them() -> None:
    """One fill serves many quantizers, and none sees what another one has noted."""
    from lightning_qat.numerics.gpu.range_rows import drop_fresh_ranges, fresh_range

    drop_fresh_ranges()
    first, second = (fresh_range(torch.device("cpu")) for _ in range(2))
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.data_ptr() != second.data_ptr()
    drop_fresh_ranges()
    third = fresh_range(torch.device("cpu"))
    assert third.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert third.tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_operation_keeps_integers_of_any_dtype(dtype: torch.dtype) -> None:
    """A product's backward reads a byte per element, and gets the numbers it has multiplied."""
    x = torch.randn(40, 50).to(dtype).requires_grad_()
    other = torch.randn(40, 50).to(dtype).requires_grad_()
    y = quantize_on_device(
        x,
        DeviceGrid(GridRule.RANGE, torch.tensor(-2.0), torch.tensor(2.5), GRIDS["int8"]),
        carries_int_repr=True,
    )
    with saving_int_repr(y):
        product = y * other
    product.sum().backward()
    assert other.grad is not None
    assert torch.equal(other.grad, y.detach())


# ------------------------------------------------------------------ learned grids


LEARNED: dict[str, tuple[GridRule, float, float]] = {
    "LSQ, symmetric": (GridRule.HALF_WIDTH, -8.96, -8.96),
    "LSQ, from zero": (GridRule.HALF_WIDTH_FROM_ZERO, 3.84, 3.84),
    "LSQ+": (GridRule.HALF_WIDTH_AND_LOW, 5.12, -1.3),
    "ULQ": (GridRule.RANGE, -2.0, 3.1),
    "ULQ, from zero": (GridRule.RANGE_FROM_ZERO, 3.1, 3.1),
    "ULQ, symmetric": (GridRule.SYMMETRIC_CLIP, 3.1, 3.1),
}


def scale_of(rule: GridRule, first: Tensor, second: Tensor, grid: IntegerGrid) -> Tensor:
    """The scale that the two tensors of a learned grid stand for."""
    if "HALF_WIDTH" in rule.name:
        # The gradient of the step is passed on as it is.
        return first.abs() / 128 + (1 - 1 / 128) * (first.abs() - first.abs().detach())
    if rule is GridRule.RANGE:
        return (second - first) / (grid.qmax - grid.qmin)
    return second / (grid.qmax - grid.qmin if "ZERO" in rule.name else grid.qmax)


def by_formula(
    rule: GridRule, x: Tensor, first: Tensor, second: Tensor, grid: IntegerGrid
) -> Tensor:
    """The learned grids in double precision; autograd goes straight through every rounding.

    What a value is rounded to is decided in float32, as everywhere: ties are others there.
    """
    qmin, qmax = float(grid.qmin), float(grid.qmax)
    scale = scale_of(rule, first, second, grid)
    scale32 = scale_of(rule, first.detach().float(), second.detach().float(), grid)
    steps = (x.detach().float() / scale32).round().double()
    rounded = x / scale + (steps - x / scale).detach()
    low = {GridRule.HALF_WIDTH_AND_LOW: second, GridRule.RANGE: first}.get(rule)
    if low is None:
        zero_point = qmin if "ZERO" in rule.name else 0.0
        return rounded.clamp(qmin - zero_point, qmax - zero_point) * scale
    # The lower end moves what lies outside: below by itself, above together with the width.
    zero_point = (qmin - low.detach().float() / scale32).round().double()
    below, above = steps < qmin - zero_point, steps > qmax - zero_point
    at_low = ((qmin - zero_point) * scale).detach() + (low - low.detach())
    width = (qmax - qmin) * scale
    at_high = ((qmax - zero_point) * scale).detach() + (low - low.detach()) + width - width.detach()
    return torch.where(below, at_low, torch.where(above, at_high, rounded * scale))


@pytest.mark.parametrize("clamped", [None, (0.0, math.inf), (0.0, 6.0), (0.0, 1.0), (0.0, 1e-3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LEARNED)
def test_learned_grids_have_the_gradients_of_the_formula(
    kind: str, dtype: torch.dtype, clamped: tuple[float, float] | None
) -> None:
    torch.manual_seed(0)
    rule, *numbers = LEARNED[kind]
    start = (torch.randn(7, 901) * 2).to(dtype)
    upstream = torch.rand(start.shape).to(dtype) + 0.5
    x = start.detach().requires_grad_()
    first, second = (torch.tensor(number, requires_grad=True) for number in numbers)
    grid = DeviceGrid(rule, first, second, GRIDS["int8"])
    y = learned_on_device(x, grid, 0.125, clamped=clamped)
    y.backward(upstream)

    x64 = start.double().requires_grad_()
    first64, second64 = (n.detach().double().requires_grad_() for n in (first, second))
    clamp = x64 if clamped is None else x64.clamp(*clamped)
    y64 = by_formula(rule, clamp, first64, second64, GRIDS["int8"])
    y64.backward(upstream.double())

    rounding = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(y.detach().double(), y64.detach(), rtol=rounding, atol=1e-6)
    stopped_at_an_end = (x64 == 0) if clamped is None else (x64 <= 0) | (x64 >= clamped[1])
    assert x.grad is not None
    assert x64.grad is not None
    expected = x64.grad.masked_fill(stopped_at_an_end & torch.tensor(clamped is not None), 0.0)
    assert_same(x.grad, expected.to(dtype))
    for own, exact in ((first, first64), (second, second64)):
        if own.grad is None:
            assert exact.grad is None
            continue
        assert exact.grad is not None
        torch.testing.assert_close(own.grad.double(), exact.grad * 0.125, rtol=1e-4, atol=1e-3)
