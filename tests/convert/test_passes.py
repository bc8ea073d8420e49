"""The rewrites of a captured graph that come before batch norm is folded, one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.convert.convert import PASSES
from lightning_qat.convert.rewrites.drop_dropout import drop_dropout, drop_single_cat
from lightning_qat.convert.rewrites.merge_quantizations import merge_quantizations
from lightning_qat.ir.exported_program import clean_up
from lightning_qat.ir.ops import fake_quantize_node


class Function(nn.Module):
    """A module of one function, with a constant."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(6.0))
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)

    def quantized(self, x: Tensor, key: str) -> Tensor:
        result: Tensor = fake_quantize_node(x, self.scale, self.zero_point, -128, 127, key)
        return result


def captured(function: Any) -> ExportedProgram:
    return torch.export.export(Function(function).eval(), (torch.ones(2),), strict=False)


def operators(program: ExportedProgram) -> list[str]:
    """The operators of a graph after dead code is gone."""
    clean_up(program)
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    return [str(node.target).split(".")[1] for node in nodes]


def test_only_a_dropout_that_does_nothing_is_removed() -> None:
    program = captured(
        lambda m, x: nn.functional.dropout(nn.functional.dropout(x, training=False), training=True)
    )
    drop_dropout(program)
    assert operators(program) == ["dropout"]
    (dropout,) = (node for node in program.graph.nodes if node.op == "call_function")
    assert dropout.args[2] is True


def test_a_cat_of_one_tensor_is_removed_and_one_of_two_stays() -> None:
    program = captured(lambda m, x: torch.cat([torch.cat([x]), x + 1]))
    drop_single_cat(program)
    assert operators(program) == ["add", "cat"]


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: (m.quantized(x, "a"), m.quantized(x, "a")), 1),
        (lambda m, x: m.quantized(m.quantized(x, "a"), "a"), 1),
        (lambda m, x: (m.quantized(x, "a"), m.quantized(x, "b")), 2),
        (lambda m, x: (m.quantized(x, "a"), m.quantized(x + 1, "a")), 2),
    ],
)
def test_a_tensor_is_quantized_once_per_key(function: Any, left: int) -> None:
    program = captured(function)
    expected = program.module()(torch.ones(2))
    merge_quantizations(program)
    assert operators(program).count("fake_quantize") == left
    torch.testing.assert_close(program.module()(torch.ones(2)), expected, rtol=0, atol=0)


def test_dropout_goes_before_quantizations_are_merged() -> None:
    def forward(m: Function, x: Tensor) -> tuple[Tensor, Tensor]:
        dropped = nn.functional.dropout(x, training=False)
        return m.quantized(x, "a"), m.quantized(torch.cat([dropped]), "a")

    program = captured(forward)
    for rewrite in PASSES:
        rewrite(program)
    assert operators(program) == ["fake_quantize"]
