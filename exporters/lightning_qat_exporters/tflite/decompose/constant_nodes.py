"""Find the nodes of a graph whose values are the same for every input of one size.

A recurrent layer without a given state starts at zero, so the first product with its hidden state
is constant. litert-torch's converter computes such nodes once and stores the results.
"""

from __future__ import annotations

import torch
from torch import fx

from lightning_qat.ir.quantized_model import QuantizedModel

_ATEN = torch.ops.aten
_FILLS = (
    *(_ATEN.zeros, _ATEN.ones, _ATEN.full, _ATEN.zeros_like, _ATEN.ones_like, _ATEN.full_like),
    *(_ATEN.new_zeros, _ATEN.new_ones, _ATEN.new_full, _ATEN.arange, _ATEN.eye),
    _ATEN.sym_size,
)
"""Operators that read at most the size of their input, which a file fixes."""


def fixed_nodes(graph: fx.Graph, constants: set[fx.Node]) -> set[fx.Node]:
    """Return every node whose values depend on no input.

    Args:
        graph: A graph in topological order.
        constants: The placeholders that are constants.
    """
    fixed = set(constants)
    for node in graph.nodes:
        filled = getattr(node.target, "overloadpacket", None) in _FILLS
        computed = node.op == "call_function" and bool(node.all_input_nodes)
        if node.op == "get_attr" or filled or (computed and set(node.all_input_nodes) <= fixed):
            fixed.add(node)
    return fixed


def fixed_in(model: QuantizedModel) -> set[str]:
    """Return the names of the nodes of a converted model whose values depend on no input."""
    inputs = set(model.input_names)
    placeholders = {n for n in model.program.graph.nodes if n.op == "placeholder"}
    constants = {n for n in placeholders if n.name not in inputs}
    return {node.name for node in fixed_nodes(model.program.graph, constants)}
