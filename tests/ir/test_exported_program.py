"""Changing the constants of an exported program."""

import torch
from torch import Tensor, nn

from lightning_qat.convert.convert import convert
from lightning_qat.ir.exported_program import Constants, copied
from tests.models import trained


def test_a_copy_has_the_same_values_in_a_graph_of_its_own() -> None:
    x = torch.randn(2, 3)
    program = convert(trained(nn.Sequential(nn.Linear(3, 3)), x), x).program
    values = dict(program.state_dict)
    nodes = [node.name for node in program.graph.nodes]
    copy = copied(program)
    assert all(copy.state_dict[name] is value for name, value in values.items())
    Constants(copy).add("unread", torch.zeros(1))
    assert len(copy.graph.nodes) == len(nodes) + 1
    assert program.state_dict == values
    assert [node.name for node in program.graph.nodes] == nodes
    program.validate()


def test_a_copy_knows_an_input_that_is_called_as_a_builtin_is() -> None:
    class Net(nn.Module):
        def forward(self, input: Tensor, sum: Tensor) -> Tensor:  # as torch's own modules do
            return input + sum

    program = torch.export.export(Net(), (torch.ones(2), torch.ones(2)), strict=False)
    copy = copied(program)
    inputs = [node.name for node in copy.graph.nodes if node.op == "placeholder"]
    assert list(copy.graph_signature.user_inputs) == inputs
    torch.testing.assert_close(copy.module()(torch.ones(2), torch.ones(2)), torch.full((2,), 2.0))
