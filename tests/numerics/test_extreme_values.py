"""Ranges of values near the ends of float32: right for as long as a grid can hold them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_qat.numerics.arithmetic import affine_qparams, rounded
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from lightning_qat.numerics.calibration.search import least_squares_scale
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.learned_activation import LearnedStepActivation
from lightning_qat.recipe.specs import ActivationSpec

GRID = IntegerGrid(-128, 127)
EXTREMES = {
    "largest": torch.tensor([-3.0e38, -1.0e38, 0.0, 2.0e38, 3.0e38]),
    "largest positive": torch.tensor([1.0e38, 3.3e38]),
    "one outlier": torch.cat((torch.linspace(-1.0, 1.0, 50), torch.tensor([3.0e38]))),
    "squares overflow": torch.linspace(-1e25, 3e25, 101),
    "squares underflow": torch.linspace(-1e-25, 3e-25, 101),
    "smallest normals": torch.linspace(-2e-38, 4e-38, 101),
    "subnormal": torch.linspace(-1e-40, 3e-40, 101),
    "zeros": torch.zeros(7),
    "constant": torch.full((9,), 0.3),
    "negative constant": torch.full((9,), -5.0),
    "one value": torch.tensor(2.0),
}


def calibrated(calibration: str, bits: int, symmetric: bool, *batches: Tensor) -> Tensor:
    """The range after some batches, as ``(low, high)``."""
    spec = ActivationSpec(calibration=calibration, bits=bits, symmetric=symmetric)
    quantizer = ActivationQuantizer(spec).train()
    for batch in batches:
        quantizer(batch)
    return torch.stack((quantizer.min_val, quantizer.max_val))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", EXTREMES)
@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_every_calibration_gives_a_finite_grid_that_holds_what_it_should(
    calibration: str, kind: str, symmetric: bool
) -> None:
    """The searches may clip, but keep a tenth of the range at least."""
    x = EXTREMES[kind]
    spec = ActivationSpec(calibration=calibration, symmetric=symmetric)
    quantizer = ActivationQuantizer(spec).train()
    quantizer(x)
    quantizer.eval()
    numbers = quantizer.qparams()
    assert bool(numbers.scale > 0)
    y = quantizer(x)
    assert bool(y.isfinite().all())
    ends = [float(quantizer.min_val), float(quantizer.max_val)]
    assert all(map(math.isfinite, ends))
    largest = float(x.abs().max())
    if largest < 2.0**-110:  # Below that a step of 8 bits is no normal number.
        assert float((y - x).abs().max()) <= largest
    elif kind != "one outlier":
        assert float(y.abs().max()) > 0.09 * largest


@pytest.mark.parametrize("exponent", [-100, -64, 40, 120, 127])
@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_range_does_not_depend_on_the_unit(calibration: str, bits: int, exponent: int) -> None:
    """A power of two changes no digit, so what is found for 1 is found for 2**127 and 2**-100."""
    batches = [torch.randn(500).clamp(-1.9, 1.9) / (2 - i) for i in range(2)]
    near_one = calibrated(calibration, bits, False, *batches)
    unit = 2.0**exponent
    found = calibrated(calibration, bits, False, *(batch * unit for batch in batches))
    expected = near_one.double() * unit
    assert torch.equal(
        found.double(), expected.clamp(-3.4028234663852886e38, 3.4028234663852886e38)
    )


@pytest.mark.parametrize("low", [-3.0e38, -1e-38, 0.0])
@pytest.mark.parametrize("high", [3.0e38, 1e-30, 1.0])
def test_a_scale_is_that_of_double_precision(low: float, high: float) -> None:
    scale, zero_point = affine_qparams(torch.tensor(low), torch.tensor(high), GRID)
    ends = torch.tensor([low, high], dtype=torch.float32).double()
    expected = float(ends[1] - ends[0]) / 255
    # Rounded twice in float32, the width and the quotient.
    assert float(scale) == pytest.approx(expected, rel=2.0**-23)
    assert float(zero_point) == pytest.approx(-128 - float(ends[0]) / expected, abs=0.501)
    assert bool(rounded(ends.float(), scale, zero_point, GRID).isfinite().all())


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_weight_s_scale_is_searched_alike_in_any_unit(unit: float) -> None:
    """Channels of one weight may differ by any factor."""
    rows = torch.randn(2, 400).sign() * torch.rand(2, 400) ** 3
    units = torch.tensor([[1.0], [2.0 ** round(math.log2(unit))]])
    weight = rows[:1] * units
    start = weight.abs().amax(1) / 7.5
    found = least_squares_scale(weight, start, IntegerGrid(-8, 7), 0)
    assert float(found[1] / found[0]) == float(units[1])
    assert float(found[0]) < float(start[0])


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_batch_that_is_not_finite_is_said_by_name_and_never_lost(
    calibration: str, bad: float
) -> None:
    quantizer = ActivationQuantizer(ActivationSpec(calibration=calibration)).train()
    for batch in (torch.randn(20), torch.tensor([1.0, bad, 2.0]), torch.randn(20), torch.zeros(0)):
        quantizer(batch)
    assert quantizer.why_not_final is not None
    assert "not finite" in quantizer.why_not_final


def test_a_range_whose_last_step_is_beyond_float32_is_said_to_be_not_finite() -> None:
    """The zero point is an integer, so the grid reaches up to half a step beyond the range."""
    quantizer = ActivationQuantizer(ActivationSpec()).train()
    quantizer(torch.tensor([-1.0, 1.0]) * torch.finfo(torch.float32).max)
    assert bool(quantizer.scale_and_zero_point()[0].isfinite())
    assert quantizer.why_not_final is not None


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_an_empty_batch_changes_nothing(calibration: str) -> None:
    quantizer = ActivationQuantizer(ActivationSpec(calibration=calibration)).train()
    assert quantizer(torch.zeros(0, 3)).shape == (0, 3)
    assert not quantizer.calibrated
    quantizer(torch.randn(20))
    before = {name: value.clone() for name, value in quantizer.named_buffers()}
    quantizer(torch.zeros(0, 3))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.named_buffers())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", ["largest", "squares overflow", "squares underflow", "zeros"])
def test_learning_starts_from_a_finite_step_and_has_finite_gradients(
    kind: str, symmetric: bool
) -> None:
    spec = ActivationSpec(quantizer="learned", calibration_batches=1, symmetric=symmetric)
    quantizer = LearnedStepActivation(spec).train()
    quantizer(EXTREMES[kind])
    x = EXTREMES[kind].clone().requires_grad_()
    (quantizer(x) * 1e-3).sum().backward()
    assert quantizer.half_width.grad is not None
    assert bool(quantizer.half_width.grad.isfinite())
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
