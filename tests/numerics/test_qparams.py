"""Grids and the numbers that place them."""

import pytest
import torch

from lightning_qat.numerics.qparams import IntegerGrid, QParams


def scalar(scale: float = 0.5, zero_point: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)


@pytest.mark.parametrize(
    ("bits", "signed", "activation", "weight"),
    [
        (16, (-32768, 32767), (-32768, 32767), (-32767, 32767)),
        (8, (-128, 127), (-128, 127), (-127, 127)),
        (7, (-64, 63), (-64, 63), (-64, 63)),
        (4, (-8, 7), (-8, 7), (-8, 7)),
        (2, (-2, 1), (-2, 1), (-2, 1)),
    ],
)
def test_bounds_of_every_grid(
    bits: int, signed: tuple[int, int], activation: tuple[int, int], weight: tuple[int, int]
) -> None:
    assert IntegerGrid.signed(bits) == IntegerGrid(*signed)
    assert IntegerGrid.activation(bits) == IntegerGrid(*activation)
    assert IntegerGrid.weight(bits) == IntegerGrid(*weight)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (IntegerGrid(-128, 127), torch.int8),
        (IntegerGrid(-8, 8), torch.int8),
        (IntegerGrid(-128, 128), torch.int16),
        (IntegerGrid(-129, 127), torch.int16),
        (IntegerGrid(0, 255), torch.int16),
    ],
)
def test_a_grid_is_held_by_the_smallest_signed_dtype(grid: IntegerGrid, dtype: torch.dtype) -> None:
    assert grid.dtype is dtype


@pytest.mark.parametrize(("qmin", "qmax"), [(1, 1), (2, 1)])
def test_a_grid_has_at_least_two_integers(qmin: int, qmax: int) -> None:
    with pytest.raises(ValueError, match=f"qmin must be below qmax; got qmin={qmin}, qmax={qmax}"):
        IntegerGrid(qmin, qmax)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_is_positive_and_finite(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be positive and finite"):
        QParams(*scalar(scale), IntegerGrid(-128, 127))


@pytest.mark.parametrize("zero_point", [-129, 128])
def test_the_zero_point_lies_on_the_grid(zero_point: int) -> None:
    with pytest.raises(ValueError, match=rf"zero_point must lie in .*; got {zero_point}"):
        QParams(*scalar(zero_point=zero_point), IntegerGrid(-128, 127))


def test_the_zero_point_may_touch_either_end() -> None:
    for end in (-128, 127):
        assert int(QParams(*scalar(zero_point=end), IntegerGrid(-128, 127)).zero_point) == end


def test_the_dtypes_are_float32_and_int32() -> None:
    scale, zero_point = scalar()
    with pytest.raises(ValueError, match=r"scale must be float32 .*; got torch\.float64"):
        QParams(scale.double(), zero_point, IntegerGrid(-8, 7))
    with pytest.raises(ValueError, match=r"zero_point int32; got torch\.float32 and torch\.int64"):
        QParams(scale, zero_point.long(), IntegerGrid(-8, 7))


def test_the_shape_follows_the_axis() -> None:
    scale, zero_point = scalar()
    with pytest.raises(ValueError, match=r"must have 1 dimension\(s\) for axis=0; got shapes \(\)"):
        QParams(scale, zero_point, IntegerGrid(-8, 7), axis=0)
    with pytest.raises(ValueError, match=r"must have 0 dimension\(s\) for axis=None"):
        QParams(scale.expand(3), zero_point.expand(3), IntegerGrid(-8, 7))
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(2,\)"):
        QParams(scale.expand(3), zero_point.expand(2), IntegerGrid(-8, 7), axis=0)


def test_equal_means_to_the_bit() -> None:
    one = QParams(*scalar(), IntegerGrid(-8, 7))
    assert one.equal(QParams(*scalar(), IntegerGrid(-8, 7)))
    next_scale = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    assert not one.equal(QParams(next_scale, scalar()[1], IntegerGrid(-8, 7)))
    assert not one.equal(QParams(*scalar(zero_point=1), IntegerGrid(-8, 7)))
    assert not one.equal(QParams(*scalar(), IntegerGrid(-8, 8)))
    per_channel = [value.expand(2) for value in scalar()]
    assert not QParams(*per_channel, IntegerGrid(-8, 7), 0).equal(
        QParams(*per_channel, IntegerGrid(-8, 7), 1)
    )
