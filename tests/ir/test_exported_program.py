"""Changing the constants of an exported program."""

import torch
from torch import nn

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
