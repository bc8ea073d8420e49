"""A dynamic batch is one: other sizes run, and what grows is the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from lightning_qat.convert.convert import convert
from tests.models import trained


class Flattens(nn.Module):
    """A convolution, then ``view(rows, -1)``, then rows of 16 values if asked for."""

    def __init__(self, rows: int, again: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(16, 3) if again else nn.Identity()
        self.rows, self.again = rows, again

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.relu(self.conv(x)).view(self.rows, -1)
        out: Tensor = self.head(flat.view(-1, 16)) if self.again else flat
        return out


@pytest.mark.parametrize(
    ("rows", "batch", "again"),
    [(8, 16, False), (8, 4, False), (8, 4, True), (8, 32, True), (1, 1, False)],
)
def test_a_view_that_fixes_the_batch_gives_a_fixed_batch(
    rows: int, batch: int, again: bool
) -> None:
    x = torch.randn(batch, 1, 4, 4)
    model = convert(trained(Flattens(rows, again), x), x)
    assert model.input_shapes == {"x": (batch, 1, 4, 4)}


@pytest.mark.parametrize("batch", [1, 4])
def test_a_batch_that_the_forward_takes_as_a_number_is_a_fixed_one(batch: int) -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.query = nn.Linear(8, 8), nn.Parameter(torch.ones(1, 8))

        def forward(self, x: Tensor) -> Tensor:
            # torch.export fixes the size at what it was, in the middle of the capture.
            result: Tensor = self.layer(x) + self.query.repeat(len(x), 1)
            return result

    x = torch.randn(batch, 8)
    model = convert(trained(Counts(), x), x)
    assert model.input_shapes == {"x": (batch, 8)}


def test_rows_of_several_per_sample_are_a_dynamic_batch() -> None:
    x = torch.randn(4, 1, 4, 4)
    model = convert(trained(Flattens(1, True), x), x)
    assert model.input_shapes == {"x": ("batch", 1, 4, 4)}
    assert model(torch.randn(3, 1, 4, 4)).shape == (12, 3)


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.embed(x)
        return z @ z.T


def test_similarities_of_all_pairs_have_a_dynamic_batch() -> None:
    x = torch.randn(4, 4)
    model = convert(trained(Pairs(), x), x)
    assert model.input_shapes == {"x": ("batch", 4)}
    assert model(torch.randn(7, 4)).shape == (7, 7)


@pytest.mark.parametrize(
    "shapes", [{"x": {2: Dim.AUTO, 3: Dim.AUTO}}, ({2: Dim.AUTO, 3: Dim.AUTO},)]
)
def test_chosen_dynamic_shapes_are_dynamic_and_no_others(shapes: Any) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1))
    net.forward = lambda x: net[1](net[0](x))  # type: ignore[method-assign] # named as in a module
    x = torch.randn(2, 1, 8, 8)
    model = convert(trained(net, x), x, dynamic_shapes=shapes)
    assert model.input_shapes == {"x": (2, 1, "x_2", "x_3")}
    assert model(torch.randn(2, 1, 5, 9)).shape == (2, 4, 1, 1)
