"""Ranges that follow from what a tensor is: relu, sigmoid, concatenation."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.joins.cases import calibrated, serving, the_plan


class Concatenates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(8, 2)
        with torch.no_grad():
            self.two.weight *= 10

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat((self.one(x), self.two(x)), 1))


def test_the_inputs_of_a_concatenation_are_tied_to_one_range() -> None:
    x = torch.randn(64, 4)
    model = calibrated(Concatenates(), x)
    quantizer = serving(model, "", "cat")
    assert quantizer is model.head.input_quantizer
    [tensor] = [t for t in the_plan(model).tensors if "head" in t.consumers]
    assert tensor.producers == ("one.linear", "two.linear")
    with torch.no_grad():
        widest = model.two(x).max()
    # Two batches of the same data: the range is that of both inputs together.
    assert float(quantizer.max_val) == pytest.approx(float(widest), rel=0.05)


class Behind(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.one, self.two = function, nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


FIXED: dict[str, tuple[Callable[[Tensor], Tensor], float, int]] = {
    "torch.sigmoid": (torch.sigmoid, 1 / 256, -128),
    "Tensor.sigmoid": (Tensor.sigmoid, 1 / 256, -128),
    "nn.Sigmoid": (nn.Sigmoid(), 1 / 256, -128),
    "F.softmax": (functools.partial(F.softmax, dim=-1), 1 / 256, -128),
    "nn.Softmax": (nn.Softmax(-1), 1 / 256, -128),
    "torch.tanh": (torch.tanh, 1 / 128, 0),
    "nn.Tanh": (nn.Tanh(), 1 / 128, 0),
    "F.relu6": (F.relu6, 6 / 255, -128),
    "nn.ReLU6": (nn.ReLU6(), 6 / 255, -128),
    "nn.ReLU6(inplace)": (nn.ReLU6(inplace=True), 6 / 255, -128),
    "nn.Hardtanh": (nn.Hardtanh(0, 4), 4 / 255, -128),
    "clamp": (lambda x: x.clamp(0, 2), 2 / 255, -128),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_function_with_a_range_by_definition_fixes_the_numbers(name: str) -> None:
    function, scale, zero_point = FIXED[name]
    model = calibrated(Behind(function), torch.randn(8, 4))
    found = model.two.input_quantizer.qparams()
    assert float(found.scale) == pytest.approx(scale, rel=1e-6)
    assert int(found.zero_point) == zero_point
    if scale in (1 / 256, 1 / 128):
        assert float(found.scale) == scale


@pytest.mark.parametrize(
    "relu", [F.relu, nn.ReLU(), nn.ReLU(inplace=True), torch.relu, torch.relu_, Tensor.relu]
)
def test_the_range_behind_relu_starts_at_zero(relu: Any) -> None:
    model = calibrated(Behind(relu), torch.randn(8, 4))
    quantizer = model.two.input_quantizer
    assert quantizer.spec.fixed_min is True
    assert int(quantizer.qparams().zero_point) == -128


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool1d(F.relu(x), 1),
        lambda x: F.relu(x).reshape(-1, 6),
        lambda x: F.pad(F.relu(x)[:, 1:], (1, 0)),
        lambda x: F.relu(x).transpose(0, 1).contiguous().permute(1, 0),
        lambda x: F.relu(x).T.T,
        lambda x: F.interpolate(F.relu(x)[:, None, ::2], scale_factor=2.0).flatten(1),
    ],
    ids=["max_pool", "reshape", "pad", "transpose", "T", "interpolate"],
)
def test_what_is_known_of_a_range_passes_through(function: Any) -> None:
    model = calibrated(Behind(function), torch.randn(8, 4))
    assert model.two.input_quantizer.spec.fixed_min is True


@pytest.mark.parametrize(
    "function", [lambda x: F.relu(x) - 1, lambda x: -F.relu(x), lambda x: F.relu(x).neg_()]
)
def test_what_is_known_of_a_range_ends_where_values_change(function: Any) -> None:
    model = calibrated(Behind(function), torch.randn(8, 4))
    assert not model.two.input_quantizer.spec.fixed_min
    assert int(model.two.input_quantizer.qparams().zero_point) > -128
