"""Compute slices of constants once."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from lightning_qat.ir.exported_program import Constants, module_path

_SLICE = torch.ops.aten.slice.Tensor


def slice_constants(program: ExportedProgram) -> None:
    """Replace every slice of a constant by a constant, in place.

    Attention packs the biases of its three projections into one parameter; each projection then
    has a bias of its own, as other linear layers have.
    """
    constants = Constants(program)
    for node in list(program.graph.nodes):
        value = constants.value(node.args[0]) if node.target is _SLICE else None
        if value is not None and all(isinstance(arg, int) for arg in node.args[1:]):
            sliced = _SLICE(value, *node.args[1:]).contiguous()
            name = f"{module_path(node)}.{node.name}".lstrip(".")
            node.replace_all_uses_with(constants.add(name, sliced))
            program.graph.erase_node(node)
