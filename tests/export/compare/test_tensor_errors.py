"""The error of one tensor, by hand."""

import math

import numpy as np
import pytest
import torch

from lightning_qat.export.compare.tensor_errors import grid_use, tensor_errors
from lightning_qat.numerics.qparams import IntegerGrid, QParams


def test_figures_of_a_hand_worked_example() -> None:
    # Noise is (0, 0, 1, -0.5): its power 1.25, the signal's 30.
    errors = tensor_errors(np.array([1.0, 2, 3, 4]), np.array([1.0, 2, 4, 3.5]), step=0.5)
    assert errors.sqnr_db == pytest.approx(10 * math.log10(30 / 1.25))
    assert errors.mse == pytest.approx(1.25 / 4)
    assert errors.cosine == pytest.approx((1 + 4 + 12 + 14) / math.sqrt(30 * (1 + 4 + 16 + 12.25)))
    assert (errors.max_steps, errors.mean_steps, errors.fraction_differing) == (2.0, 0.75, 0.5)
    assert errors.fraction_off_grid == 0


def test_equal_tensors_have_no_error() -> None:
    errors = tensor_errors(np.ones(3), np.ones(3), step=0.1)
    assert (errors.sqnr_db, errors.mse, errors.cosine) == (math.inf, 0.0, pytest.approx(1.0))


def test_noise_without_a_signal_has_the_lowest_ratio() -> None:
    errors = tensor_errors(np.zeros(3), np.array([0.0, 0.0, 1.0]), step=0.1)
    assert (errors.sqnr_db, errors.cosine) == (-math.inf, 0.0)


def test_values_of_another_scale_lie_between_the_steps() -> None:
    integers = np.arange(-100, 100)
    errors = tensor_errors(integers * 0.1, integers * 0.11, step=0.1)
    # A tenth of a step more for each integer: whole steps at multiples of ten.
    assert errors.fraction_off_grid == pytest.approx(0.9)


def test_whole_steps_of_16_bits_count_as_whole_in_float32() -> None:
    integers = np.arange(0, 65536, 7)
    scale = np.float32(0.0123)
    reciprocal = np.float32(1) / (np.float32(1) / scale)
    reference = integers.astype(np.float32) * scale
    errors = tensor_errors(reference, integers.astype(np.float32) * reciprocal, float(scale))
    assert errors.fraction_off_grid == 0


def qparams(scale: float, zero_point: int) -> QParams:
    return QParams(
        torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), IntegerGrid(-128, 127)
    )


def test_what_lies_outside_the_range_is_clipped() -> None:
    # 0.1 * (-128 .. 127) is -12.8 .. 12.7; 12.74 rounds to the last step.
    use = grid_use(np.array([12.74, 12.76, -13.0, 0.0], np.float32), qparams(0.1, 0))
    assert use.clipped == 0.5


def test_half_a_range_leaves_half_of_the_grid() -> None:
    use = grid_use(np.linspace(0, 12.7, 500, dtype=np.float32), qparams(0.1, 0))
    assert use.unused == 0.5


def test_a_channel_that_rounds_to_zero_is_dead() -> None:
    x = np.zeros((4, 3, 2), np.float32)
    x[:, 0] = 1.0  # alive
    x[:, 1] = 0.04  # rounds to 0
    assert grid_use(x, qparams(0.1, 0)).dead_channels == 1
