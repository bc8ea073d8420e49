"""Folding a batch norm into integers, scale and bias is exact."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.convert.batchnorm import BatchNormStatistics
from lightning_qat.numerics.arithmetic import along_axis
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.quantizers.final import FinalWeight
from lightning_qat.quantizers.weight import WeightQuantizer
from lightning_qat.recipe.specs import WeightSpec

GAMMA = torch.tensor([1.5, -0.7, 1e-6, -2.0])


def statistics(gamma: Tensor | None = GAMMA, beta: bool = True) -> BatchNormStatistics:
    return BatchNormStatistics(
        gamma,
        torch.tensor([0.1, -0.2, 0.3, 0.0]) if beta else None,
        torch.tensor([0.5, -0.5, 0.0, 1.0]),
        torch.tensor([1.0, 0.25, 2.0, 1e-8]),
        1e-5,
    )


def weight_integers(spec: WeightSpec, weight: Tensor) -> tuple[Tensor, QParams]:
    qparams = WeightQuantizer(spec, axis=0).qparams(weight)
    return FinalWeight.from_weight(weight, qparams, "w").integers, qparams


def in_float64(stats: BatchNormStatistics) -> Tensor:
    gamma = torch.ones(4) if stats.gamma is None else stats.gamma
    return gamma.double() / torch.sqrt(stats.var.double() + stats.eps)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("quantizer", ["minmax", "arq"])
def test_the_folded_weight_is_the_factor_times_the_weight(
    bits: int, granularity: str, quantizer: str
) -> None:
    # AMCT's rule touches -128 where the negative side reaches farther: let the positive side.
    weight = torch.randn(4, 3, 3, 3)
    weight[:, 0, 0, 0] = 5.0
    spec = WeightSpec(bits, granularity, quantizer)  # type: ignore[arg-type]
    integers, qparams = weight_integers(spec, weight)
    stats = statistics()
    folded, params, saturated = stats.fold_integers(integers, qparams, axis=0)
    assert saturated == 0
    assert params.axis == 0
    factor = along_axis(in_float64(stats), 4, 0)
    unfolded = integers.double() * along_axis(qparams.scale.double(), 4, qparams.axis)
    real = folded.double() * along_axis(params.scale.double(), 4, 0)
    # The new scale is rounded to float32 four times on its way: sum, root, quotient, product.
    torch.testing.assert_close(real, factor * unfolded, rtol=4 * 2.0**-23, atol=0)


@pytest.mark.parametrize(
    ("bits", "lowest", "grid"),
    [(8, -127, IntegerGrid(-127, 127)), (4, -8, IntegerGrid(-8, 8)), (2, -2, IntegerGrid(-2, 2))],
)
def test_a_negative_factor_mirrors_the_integers_and_loses_none(
    bits: int, lowest: int, grid: IntegerGrid
) -> None:
    weight_grid = IntegerGrid.weight(bits)
    row = torch.arange(weight_grid.qmin, weight_grid.qmax + 1, dtype=torch.int8)
    integers = torch.stack((row, row, row, row))
    qparams = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), weight_grid, 0)
    folded, params, saturated = statistics().fold_integers(integers, qparams, axis=0)
    assert saturated == 0
    assert params.grid == grid
    assert torch.equal(folded[0], row)
    assert torch.equal(folded[1].int(), -row.int())
    assert int(folded[1].max()) == -lowest


def test_a_grid_without_need_is_not_mirrored() -> None:
    integers = torch.tensor([[-8, 7]] * 4, dtype=torch.int8)
    qparams = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), IntegerGrid(-8, 7), 0)
    _, params, _ = statistics(GAMMA.abs()).fold_integers(integers, qparams, axis=0)
    assert params.grid == IntegerGrid(-8, 7)


def test_only_amct_s_full_8_bit_grid_saturates_and_says_how_often() -> None:
    integers = torch.tensor([[-128, -128, -127]] * 4, dtype=torch.int8)
    qparams = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), IntegerGrid(-128, 127), 0)
    folded, params, saturated = statistics().fold_integers(integers, qparams, axis=0)
    assert folded.tolist() == [[-128, -128, -127], [127] * 3, [-128, -128, -127], [127] * 3]
    assert saturated == 4
    assert params.grid == IntegerGrid(-128, 127)
    assert folded.dtype is torch.int8


@pytest.mark.parametrize("gamma", [0.0, 1e-45, 1e-42])
def test_a_channel_that_gamma_switches_off_is_zero_and_keeps_a_usable_scale(gamma: float) -> None:
    # Weight decay drives the gamma of a dead channel below the smallest normal float32.
    integers = torch.full((4, 3), 100, dtype=torch.int8)
    qparams = QParams(
        torch.full((4,), 0.001), torch.zeros(4, dtype=torch.int32), IntegerGrid(-127, 127), 0
    )
    stats = BatchNormStatistics(
        torch.tensor([gamma, 1.0, -gamma, 1.0]), None, torch.zeros(4), torch.ones(4), 1e-5
    )
    folded, params, _ = stats.fold_integers(integers, qparams, axis=0)
    real = folded.double() * params.scale.double()[:, None]
    # Below the smallest normal float32, real arithmetic gives zero or as good as zero.
    assert bool((real[[0, 2]].abs() < 1e-37).all())
    assert folded[1].tolist() == [100, 100, 100]


@pytest.mark.parametrize("bias", [torch.tensor([1.0, -1.0, 0.5, 2.0]), None])
@pytest.mark.parametrize("gamma", [GAMMA, None])
@pytest.mark.parametrize("beta", [True, False])
def test_the_folded_bias_is_the_formula_in_double_precision(
    bias: Tensor | None, gamma: Tensor | None, beta: bool
) -> None:
    stats = statistics(gamma, beta)
    plain = torch.zeros(4, dtype=torch.float64) if bias is None else bias.double()
    expected = in_float64(stats) * (plain - stats.mean.double())
    if stats.beta is not None:
        expected = expected + stats.beta.double()
    found = stats.fold_bias(bias)
    assert found.dtype is torch.float32
    # The factor is rounded three times, the bias twice more; a sum that cancels keeps the absolute
    # error of its terms, which are below 700 (the smallest variance is 1e-8).
    torch.testing.assert_close(found.double(), expected, rtol=6 * 2.0**-23, atol=1e-7)


def test_the_folded_float_layer_computes_layer_then_batch_norm() -> None:
    stats, weight, bias, x = (
        statistics(),
        torch.randn(4, 2, 3),
        torch.randn(4),
        torch.randn(5, 2, 9),
    )
    expected = F.batch_norm(
        F.conv1d(x.double(), weight.double(), bias.double()),
        stats.mean.double(),
        stats.var.double(),
        GAMMA.double(),
        stats.beta.double(),  # type: ignore[union-attr]
        eps=stats.eps,
    )
    found = F.conv1d(x, stats.fold_weight(weight, 0), stats.fold_bias(bias))
    # Six products and a bias in float32; channel 3 has a factor of 632 and a cancelling bias.
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)


def test_the_output_channel_may_be_on_another_axis() -> None:
    stats, weight = statistics(), torch.randn(3, 4, 2)
    expected = weight * stats.factor[None, :, None]
    assert torch.equal(stats.fold_weight(weight, 1), expected)
    integers = torch.randint(-127, 128, (3, 4, 2), dtype=torch.int8)
    qparams = QParams(torch.ones(4), torch.zeros(4, dtype=torch.int32), IntegerGrid(-127, 127), 1)
    folded, params, _ = stats.fold_integers(integers, qparams, axis=1)
    assert params.axis == 1
    signs = torch.tensor([1, -1, 1, -1])[None, :, None]
    assert torch.equal(folded.int(), integers.int() * signs)


def test_the_factor_is_gamma_over_the_deviation() -> None:
    stats = BatchNormStatistics(
        torch.tensor([3.0, -1.0]), None, torch.zeros(2), torch.tensor([3.0, 0.0]), 1.0
    )
    assert np.array_equal(stats.factor.numpy(), np.array([1.5, -1.0], np.float32))
