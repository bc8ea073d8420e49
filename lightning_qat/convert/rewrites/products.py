"""Products with a weight become linear layers, whose form every target knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lightning_qat.ir.exported_program import Constants
from lightning_qat.ir.ops import DEQUANTIZE, DequantizeCall, as_dequantize

_ATEN = torch.ops.aten
_PRODUCTS = (_ATEN.matmul.default, _ATEN.mm.default)


def products_as_layers(program: ExportedProgram) -> None:
    """``matmul(x, w)`` and ``addmm(bias, x, w)`` become ``linear(x, w.T, bias)``, in place.

    Only with a quantized matrix ``w`` on the right, whose integers are stored transposed.
    """
    constants = Constants(program)
    transposed: dict[fx.Node, fx.Node] = {}
    for node in list(program.graph.nodes):
        found = _operands(node, constants)
        if found is None:
            continue
        x, weight, bias = found
        if weight not in transposed:
            new = _transposed(program, constants, weight)
            if new is None:
                continue
            transposed[weight] = new
        node.target = _ATEN.linear.default
        node.args = (x, transposed[weight], *bias)
    # Dequantize nodes without readers go with the dead code.


def _operands(node: fx.Node, constants: Constants) -> tuple[Any, fx.Node, tuple[Any, ...]] | None:
    """Input, weight and bias of a product that has the form of a layer."""
    args: Any = node.args
    bias: tuple[Any, ...] = ()
    if node.target in _PRODUCTS:
        x, weight = args[0], args[1]
    elif node.target is _ATEN.addmm.default and not node.kwargs and len(args) == 3:
        x, weight, bias = args[1], args[2], (args[0],)
        value = constants.value(args[0])
        if value is None or value.dim() != 1:
            return None
    else:
        return None
    return (x, weight, bias) if as_dequantize(weight) is not None else None


def _transposed(program: ExportedProgram, constants: Constants, weight: fx.Node) -> fx.Node | None:
    call = as_dequantize(weight)
    assert call is not None
    integers = constants.value(call.integers)
    if integers is None or integers.dim() != 2 or call.axis == 0:
        return None
    stored = constants.add(f"{call.key}_rows", integers.t().contiguous())
    axis = None if call.axis is None else 0
    with program.graph.inserting_before(weight):
        new = DequantizeCall(stored, call.scale, call.grid, axis, call.key)
        node: fx.Node = program.graph.call_function(DEQUANTIZE, new.args)
    node.meta.update(weight.meta)
    node.meta["val"] = weight.meta["val"].t()
    return node
