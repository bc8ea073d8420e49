"""Compute once what a layer adds and no input changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.ir.exported_program import Constants, module_path
from lightning_qat.layers.table import CHANNEL_AXES


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
