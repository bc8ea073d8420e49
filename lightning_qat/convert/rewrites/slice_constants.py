"""Compute once what is made of constants: slices of packed biases, and biases put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.ir.exported_program import Constants, module_path
from lightning_qat.layers.table import CHANNEL_AXES

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


def constant_biases(program: ExportedProgram) -> None:
    """Replace every bias that is computed from constants by a constant, in place.

    Fused attention concatenates the biases of query, key and value in its forward.
    """
    constants = Constants(program)
    for node in list(program.graph.nodes):
        bias = node.args[2] if node.target in CHANNEL_AXES and len(node.args) > 2 else None
        if not isinstance(bias, fx.Node) or constants.value(bias) is not None:
            continue
        value = _value(bias, constants)
        if value is not None:
            name = f"{module_path(node)}.{node.name}_bias".lstrip(".")
            node.update_arg(2, constants.add(name, value.contiguous()))


def _value(node: fx.Node, constants: Constants) -> Tensor | None:
    """The value of a node that depends on constants alone; ``None`` for any other."""
    known = constants.value(node)
    if known is not None or node.op != "call_function":
        return known
    found: dict[fx.Node, Tensor | None] = {
        before: _value(before, constants) for before in node.all_input_nodes
    }
    if not found or any(value is None for value in found.values()):
        return None
    arguments: Any = pytree.tree_map_only(fx.Node, found.__getitem__, (node.args, node.kwargs))
    target: Any = node.target
    result = target(*arguments[0], **arguments[1])
    return result if isinstance(result, Tensor) else None
