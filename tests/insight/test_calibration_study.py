"""Calibrations compared on data: against the same numbers worked out by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_qat import Recipe, calibration_study
from lightning_qat.numerics.calibration.calibrations import CALIBRATIONS
from tests.insight.test_sensitivity import quantized_by, sqnr
from tests.models import ResidualAdd, linear

FOUR_BITS = Recipe.from_dict({"activation": {"bits": 4}, "weight": {"bits": 4}})


def test_the_errors_of_min_and_max_are_those_of_a_grid_from_end_to_end() -> None:
    model, data = nn.Linear(4, 3).eval(), [torch.rand(8, 4) * 6 - 1, torch.rand(8, 4) * 6 - 1]
    study = calibration_study(nn.Sequential(model), data, FOUR_BITS)
    x = torch.cat(data).double()
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 15
    zero_point = round(-8 - low / scale)
    grid = ((x / scale).round() + zero_point).clamp(-8, 7)
    noise = ((grid - zero_point) * scale - x).square()
    row = next(r for r in study.rows if (r.setting, r.tensor) == ("minmax", "input"))
    assert row.layer == "0"
    assert row.mse == pytest.approx(float(noise.mean()), rel=1e-3)
    assert row.sqnr_db == pytest.approx(
        10 * math.log10(float(x.square().sum() / noise.sum())), abs=1e-2
    )


def test_every_calibration_scheme_and_granularity_is_compared() -> None:
    model = ResidualAdd().eval()
    with torch.no_grad():
        for layer in (model.conv1, model.conv2, model.head):
            layer.weight[0] *= 10
    x = torch.randn(8, 4, 6, 6)
    study = calibration_study(model, x, FOUR_BITS)
    assert type(model.conv1) is nn.Conv2d
    assert study.settings == (*CALIBRATIONS, "affine", "symmetric", "per_channel", "per_tensor")
    assert set(study.sqnr("mse")) == {"conv1.input", "conv2.input", "head.input", "outputs"}
    weights = {"conv1.weight", "conv2.weight", "head.weight", "outputs"}
    assert set(study.sqnr("per_tensor")) == weights
    for name in ("conv1", "conv2", "head"):
        coarse, fine = (study.sqnr(s)[f"{name}.weight"] for s in ("per_tensor", "per_channel"))
        assert fine > coarse
    # conv2 and head read what a relu made: a symmetric grid has half its steps for nothing.
    for name in ("conv2", "head"):
        key = f"{name}.input"
        assert study.sqnr("affine")[key] > study.sqnr("symmetric")[key] + 3
    # Those of the outputs are of the quantized model.
    expected = sqnr(model, quantized_by(model, FOUR_BITS, x), x)
    assert study.sqnr("moving_average")["outputs"] == pytest.approx(expected, abs=1e-4)


def test_clipping_pays_where_one_value_is_far_out() -> None:
    x = torch.randn(4096, 6)
    x[0, 0], x[0, 1] = 60.0, -60.0
    study = calibration_study(linear().eval(), [x], FOUR_BITS)
    found = {setting: study.sqnr(setting)["0.input"] for setting in CALIBRATIONS}
    for clips in ("percentile", "mse", "entropy", "histogram"):
        assert found[clips] > found["minmax"] + 5
    assert found["minmax"] == found["moving_average"]
    # The row's best has a star.
    assert study.best()["0.input"] in CALIBRATIONS
    line = next(text for text in str(study).splitlines() if text.startswith("0.input"))
    assert line.count("*") == 1


def test_a_plot_has_a_curve_for_each_calibration(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    calibration_study(linear().eval(), torch.randn(8, 6)).plot(tmp_path / "study.svg")
    assert "<svg" in (tmp_path / "study.svg").read_text()


def test_a_quantized_model_is_refused() -> None:
    made = quantized_by(linear(), Recipe(), torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"takes a float model.*is quantized already"):
        calibration_study(made, torch.randn(4, 6))
