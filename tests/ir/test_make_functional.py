"""Operators that write into their tensor, as those that return a new one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_qat.ir.make_functional import make_functional


class Of(nn.Module):
    """A module of one function of a tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def captured(function: Callable[[Tensor], Any]) -> ExportedProgram:
    return torch.export.export(
        Of(function).eval(), (torch.ones(3, 4),), dynamic_shapes=({0: Dim.AUTO},), strict=False
    )


def _reads_before_and_after(x: Tensor) -> Tensor:
    y = x * 2.0
    before = y + 1.0
    y.relu_()
    y += before
    return before * y


def _writes_integers_of_floats(x: Tensor) -> Tensor:
    y = (x * 3.0).int()
    y *= torch.arange(4, dtype=torch.int8)
    return y


def _writes_what_has_another_view(x: Tensor) -> Tensor:
    total = torch.zeros(4)
    view = total.view(2, 2)
    total += x.sum(0)
    return view.flatten() + x


def _writes_its_input(x: Tensor) -> Tensor:
    return x.mul_(2.0) + 1.0


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (_reads_before_and_after, []),
        (lambda x: torch.relu_(x * 1.0).clamp_(max=0.5), []),
        (_writes_integers_of_floats, ["mul_"]),
        (lambda x: (x * 1.0)[:, :2].relu_(), ["relu_"]),
        (_writes_what_has_another_view, ["add_"]),
        (_writes_its_input, ["mul_"]),
    ],
)
def test_operators_in_place_return_a_new_tensor_where_nothing_else_has_the_memory(
    function: Callable[[Tensor], Any], left: list[str]
) -> None:
    program = captured(function)
    x = torch.randn(5, 4)
    expected = Of(function)(x.clone())
    make_functional(program.graph)
    program.graph.lint()
    names = [
        str(node.target).split(".")[1] for node in program.graph.nodes if "." in str(node.target)
    ]
    assert [name for name in names if name.endswith("_")] == left
    torch.testing.assert_close(program.module()(x.clone()), expected, rtol=0, atol=0)
