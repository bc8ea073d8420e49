"""What of a converted model's graph is the same for every input of one size.

A recurrent layer starts at zero where it is given no state, so the first product with its hidden
state is known. litert-torch's converter computes such things once and stores the results.
"""

from __future__ import annotations

import torch
from torch import fx

from lightning_qat.ir.quantized_model import QuantizedModel

_ATEN = torch.ops.aten
_FILLS = (
    *(_ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like),
    *(_ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full),
)
"""Operators that read at most the size of what they are given."""


def fixed_nodes(graph: fx.Graph, constants: set[fx.Node]) -> set[fx.Node]:
    """Every node whose values depend on no input.

    Args:
        graph: In order.
        constants: Its placeholders that are constants.
    """
    fixed = set(constants)
    for node in graph.nodes:
        filled = getattr(node.target, "overloadpacket", None) in _FILLS
        computed = node.op == "call_function" and bool(node.all_input_nodes)
        if node.op == "get_attr" or filled or (computed and set(node.all_input_nodes) <= fixed):
            fixed.add(node)
    return fixed


def fixed_in(model: QuantizedModel) -> set[str]:
    """The names of such nodes in a converted model."""
    inputs = set(model.input_names)
    placeholders = {n for n in model.program.graph.nodes if n.op == "placeholder"}
    constants = {n for n in placeholders if n.name not in inputs}
    return {node.name for node in fixed_nodes(model.program.graph, constants)}
