"""Coordinates of histograms, of the loss curve and of the plan, worked by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.report.charts import HEIGHT, WIDTH, histogram_chart, loss_chart
from lightning_qat.report.data import Arrow, Box, Histogram, Plan, Training
from lightning_qat.report.layout import layout_of
from lightning_qat.report.plan import plan_of
from tests.models import ResidualAdd, trained


def test_bars_outside_the_grid_are_drawn_apart() -> None:
    # Eight bins from 0 to 8 on a grid of the integers 0 to 3: the bin of 3 reaches to 4.
    histogram = Histogram(0.0, 8.0, (4, 0, 1, 0, 0, 0, 0, 4), 0.0, 3.0, 1.0, 0.0, "value")
    chart = histogram_chart(histogram)
    width = WIDTH // 8
    # Heights are square roots: 1 of 4 is half as high.
    assert chart.inside == (
        f"M0 {HEIGHT}V0H{width}V{HEIGHT}M{2 * width} {HEIGHT}V{HEIGHT // 2}H{3 * width}V{HEIGHT}"
    )
    assert chart.outside == f"M{7 * width} {HEIGHT}V0H{8 * width}V{HEIGHT}"
    assert (chart.grid, chart.zero, chart.every) == ((0, 3 * width), 0, 1)
    assert chart.ticks.count("M") == 4


def test_a_fine_grid_has_a_tick_for_so_many_integers() -> None:
    histogram = Histogram(-128.0, 127.0, (1,) * 64, -128.0, 127.0, 1.0, 0.0, "integer")
    chart = histogram_chart(histogram)
    assert (chart.every, chart.ticks.count("M")) == (8, 32)


def test_values_that_are_all_the_same_have_a_histogram() -> None:
    chart = histogram_chart(Histogram(0.0, 0.0, (7,), 0.0, 0.0, 1.0, 0.0, "value"))
    assert chart.inside


def test_phases_are_bands_behind_the_loss() -> None:
    losses = ((0, 3.0), (50, 2.0), (100, 1.0))
    chart = loss_chart(Training(losses, ((0, "calibrate"), (25, "quantize"))))
    assert chart is not None
    assert chart.path == "M0 8L360 100L720 192"
    bands = [(band.name, band.left, band.width) for band in chart.bands]
    assert bands == [("calibrate", 0, 180), ("quantize", 180, 540)]
    assert not chart.logarithmic


def test_losses_over_orders_of_magnitude_are_on_a_logarithmic_scale() -> None:
    chart = loss_chart(Training(((0, 100.0), (1, 10.0), (2, 1.0))))
    assert chart is not None
    assert chart.logarithmic
    assert chart.path == "M0 8L360 100L720 192"


def test_without_two_losses_there_is_no_curve() -> None:
    assert loss_chart(Training(((0, 1.0), (1, float("nan"))))) is None


def test_the_plan_shows_calls_and_the_tensors_between_them() -> None:
    x = torch.randn(4, 4, 6, 6)
    plan = plan_of(convert(trained(ResidualAdd(), x), x))
    labels = [(box.label, box.detail, box.kind) for box in plan.boxes]
    assert labels == [
        ("x", "input", "input"),
        ("conv1", "conv2d · relu", "integer"),
        ("conv2", "conv2d", "integer"),
        ("add", "add · relu", "integer"),
        ("mean", "mean", "integer"),
        ("head", "linear", "integer"),
        ("output", "", "output"),
    ]
    assert {(a.start, a.end, a.tensor, a.bits) for a in plan.arrows} == {
        (0, 1, "conv1.input", 8),
        (1, 2, "conv2.input", 8),
        (2, 3, "add_0_0", 8),
        (0, 3, "conv1.input", 8),
        (3, 4, "mean_0_0", 8),
        (4, 5, "head.input", 8),
        (5, 6, "head.output_0_0", 8),
    }
    assert [box.layer for box in plan.boxes] == [None, 0, 1, None, None, 2, None]


class InFloat(nn.Module):
    """A softmax between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y * y.softmax(-1))


def test_what_is_float_is_told_apart() -> None:
    x = torch.randn(4, 6)
    plan = plan_of(convert(trained(InFloat(), x, {"joins": False, "outputs": False}), x))
    kinds = {box.label: box.kind for box in plan.boxes}
    assert kinds == {
        **{"x": "input", "first": "integer", "softmax": "float", "mul": "float"},
        **{"last": "integer", "output": "output"},
    }
    assert [a.bits for a in plan.arrows if plan.boxes[a.end].label == "mul"] == [0, 0]


def test_boxes_stand_in_rows_and_never_on_each_other() -> None:
    # Two ways from 0 to 3, and one arrow that passes a row.
    boxes = tuple(Box(str(n), "", "other") for n in range(5))
    arrows = (Arrow(0, 1), Arrow(0, 2), Arrow(1, 3), Arrow(2, 3), Arrow(0, 3), Arrow(3, 4))
    layout = layout_of(Plan(boxes, arrows))
    tops = [top for _, top in layout.boxes]
    assert tops[0] < tops[1] == tops[2] < tops[3] < tops[4]
    assert len(set(layout.boxes)) == 5
    assert len(layout.paths) == 6
    assert max(left for left, _ in layout.boxes) + 200 < layout.width


def test_an_empty_plan_has_a_layout() -> None:
    assert layout_of(Plan((), ())).boxes == ()
