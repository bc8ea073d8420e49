"""What depends on no input is computed once; everything else stays as it was captured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_qat.convert.rewrites.fold_constants import fold_constants
from lightning_qat.ir.exported_program import Constants, clean_up
from lightning_qat.ir.ops import dequantize_node, fake_quantize_node


class Of(nn.Module):
    """A module of one function, with a table of constants and a packed bias."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4))
        self.register_buffer("integers", torch.arange(12, dtype=torch.int8).reshape(3, 4))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def captured(function: Callable[[Any, Tensor], Any], rows: int = 3) -> ExportedProgram:
    """The program of a function of a tensor (rows, 4); the number of rows is left open."""
    return torch.export.export(
        Of(function).eval(), (torch.ones(rows, 4),), dynamic_shapes=({0: Dim.AUTO},), strict=False
    )


def operators(program: ExportedProgram) -> list[str]:
    clean_up(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return [str(node.target).split(".")[1] for node in nodes]


def _written_mask(m: Any, x: Tensor) -> Tensor:
    # The mask of Swin's shifted windows: zeros, written region by region, then compared.
    mask = torch.zeros(3, 4)
    mask[:1] = 1.0
    before = mask + 0.0
    mask[1:, 2:] = 2.0
    return x[:3] + before + mask.masked_fill(mask != 0, -100.0)


FOLDED: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "a slice of a buffer": (lambda m, x: x + m.table[0], ["add"]),
    "one called like a method of modules": (lambda m, x: x + m.integers[0].to(x.dtype), ["add"]),
    "an identity matrix": (lambda m, x: x @ torch.eye(4), ["matmul"]),
    "positions": (lambda m, x: x + torch.outer(torch.arange(1), m.table[0].cos()), ["add"]),
    "several results": (lambda m, x: x + m.table.split(1)[2], ["add"]),
    "a causal mask, of zeros of the type of what it masks": (
        lambda m, x: x + x.new_zeros(1, 4).masked_fill_(m.table[:1] > 1, -float("inf")),
        ["add"],
    ),
    "numbers like a constant's": (lambda m, x: x + torch.full_like(m.table[0], 2.5), ["add"]),
    "a mask written in place": (_written_mask, ["slice", "add", "add"]),
}


@pytest.mark.parametrize("name", FOLDED)
def test_what_depends_on_no_input_is_a_constant(name: str) -> None:
    function, left = FOLDED[name]
    program = captured(function)
    x = torch.randn(5, 4)[:3]
    expected = Of(function)(x)
    fold_constants(program)
    assert operators(program) == left
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


def _write_from_outside(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros(4)
    view = total.view(2, 2)
    total += x.sum(0)
    return view.flatten() + x


def _view_of_open_size(m: Any, x: Tensor) -> Tensor:
    row = torch.zeros(1, 4)
    rows = row.expand(x.shape[0], 4)
    row.fill_(3.0)
    return rows + x


KEPT: dict[str, Callable[[Any, Tensor], Any]] = {
    "a write of what an input decides": _write_from_outside,
    "a view that is read after a write": _view_of_open_size,
    "a first state, which is quantized": lambda m, x: (
        x + fake_quantize_node(x.new_zeros(1, 4), m.scale, m.zero_point, -128, 127, "k")
    ),
    "zeros like an input of open size": lambda m, x: x + torch.zeros_like(x).cos(),
    "a size of the input": lambda m, x: x + torch.arange(x.shape[0])[:, None],
    "random numbers": lambda m, x: x + torch.rand(4),
    "a quantized weight": lambda m, x: (
        x[:, :3] @ dequantize_node(m.integers, m.scale, -128, 127, None, "k")
    ),
    "what is returned": lambda m, x: (x + 1.0, m.table.cos()),
    "a table of three million numbers made of twelve": lambda m, x: (
        x.sum() + m.table.repeat(1 << 10, 1 << 8).cos()
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_cannot_be_computed_once_stays(name: str) -> None:
    program = captured(KEPT[name])
    before = operators(program)
    x = torch.randn(3, 4)
    torch.manual_seed(1)
    expected = program.module()(x)
    fold_constants(program)
    assert operators(program) == before
    torch.manual_seed(1)
    torch.testing.assert_close(program.module()(x), expected, rtol=0, atol=0)


def test_a_constant_is_stored_once_and_under_the_module_that_made_it() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            grid = torch.arange(4.0) * 2.0
            return x * grid + grid

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = Inner()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(x)
            return result

    program = torch.export.export(Outer(), (torch.ones(3, 4),), strict=False)
    fold_constants(program)
    clean_up(program)
    constants = Constants(program)
    stored = [node for node in program.graph.nodes if constants.name(node) is not None]
    assert [constants.name(node) for node in stored] == ["head.mul_folded"]
    value = constants.value(stored[0])
    assert value is not None
    assert value.tolist() == [0.0, 2.0, 4.0, 6.0]
