"""How the ranges of batches become one range."""

import pytest
import torch
from torch import Tensor

from lightning_qat.observers import UPDATES, batch_range


def follow(update: str, batches: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    low, high, count = torch.tensor(0.0), torch.tensor(0.0), torch.tensor(0.0)
    for batch_low, batch_high in batches:
        UPDATES[update](low, high, torch.tensor([-batch_low, batch_high]), count)
        count += 1
    return low, high


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_batch_s_range_is_minus_min_and_max_in_float32(dtype: torch.dtype) -> None:
    found = batch_range(torch.tensor([[-1.5, 0.0], [3.0, 2.0]], dtype=dtype))
    assert found.dtype is torch.float32
    assert found.tolist() == [1.5, 3.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2.0, 3.0], [-2.0, 3.0]), ([-3.0, -2.0], [3.0, -2.0]), ([0.5], [-0.5, 0.5])],
)
def test_a_range_need_not_hold_zero(values: list[float], expected: list[float]) -> None:
    assert batch_range(torch.tensor(values)).tolist() == expected


def test_a_range_has_no_gradient() -> None:
    assert not batch_range(torch.randn(4, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (float("nan"), [torch.inf, torch.inf]),
        (float("inf"), [1.0, torch.inf]),
        (float("-inf"), [torch.inf, 2.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_infinite_in_the_range_so_no_maximum_loses_it(
    bad: float, expected: list[float], dtype: torch.dtype
) -> None:
    found = batch_range(torch.tensor([-1.0, bad, 2.0], dtype=dtype))
    assert found.tolist() == expected
    assert torch.maximum(found, torch.tensor([9.0, 9.0])).isinf().any()


def test_the_maximum_of_two_ranges_is_the_range_of_both() -> None:
    a, b = torch.randn(10), torch.randn(10) * 2
    assert torch.equal(
        torch.maximum(batch_range(a), batch_range(b)), batch_range(torch.cat((a, b)))
    )


def test_moving_average_is_the_mean_at_first() -> None:
    low, high = follow("moving_average", [(-1.0, 1.0), (-3.0, 2.0), (-2.0, 6.0)])
    # Three additions in float32.
    torch.testing.assert_close(low, torch.tensor(-2.0), rtol=3e-7, atol=0)
    torch.testing.assert_close(high, torch.tensor(3.0), rtol=3e-7, atol=0)


def test_the_first_batch_replaces_the_zeros() -> None:
    for update in UPDATES:
        assert [float(end) for end in follow(update, [(1.0, 3.0)])] == [1.0, 3.0]


def test_moving_average_equals_the_loop_in_double_precision() -> None:
    batches = [(-float(a), float(b)) for a, b in torch.rand(300, 2)]
    low = high = 0.0
    for number, (batch_low, batch_high) in enumerate(batches):
        weight = max(0.01, 1.0 / (number + 1))
        low += (batch_low - low) * weight
        high += (batch_high - high) * weight
    found = follow("moving_average", batches)
    # Rounding of 300 float32 updates, most of which is averaged away.
    torch.testing.assert_close(found[0], torch.tensor(low), rtol=2e-5, atol=0)
    torch.testing.assert_close(found[1], torch.tensor(high), rtol=2e-5, atol=0)


def test_a_settled_moving_average_moves_by_one_hundredth() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    UPDATES["moving_average"](low, high, torch.tensor([2.0, 3.0]), torch.tensor(5000.0))
    # One float32 operation.
    torch.testing.assert_close(low, torch.tensor(-1.01), rtol=1.2e-7, atol=0)
    torch.testing.assert_close(high, torch.tensor(1.02), rtol=1.2e-7, atol=0)


def test_minmax_never_narrows() -> None:
    low, high = follow("minmax", [(-1.0, 1.0), (-0.5, 2.0), (-3.0, 0.5), (0.0, 0.0)])
    assert [float(low), float(high)] == [-3.0, 2.0]


def test_minmax_follows_a_range_above_zero() -> None:
    assert [float(end) for end in follow("minmax", [(2.0, 3.0), (1.0, 2.0)])] == [1.0, 3.0]
