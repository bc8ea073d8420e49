"""The recurrent layers of a converted model, as plain data.

``convert`` unrolls an LSTM or a GRU into one matrix product per time step. A target with an
operator for the whole layer must find the steps again: a ``Recurrence`` says which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx
from torch.export import ExportedProgram

from lightning_qat.ir.exported_program import module_path

Kind = Literal["LSTM", "GRU"]

GATES: Mapping[str, tuple[int, ...]] = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}
"""Where torch has the gates that ONNX has in this order."""


@dataclass(frozen=True)
class Recurrence:
    """A recurrent layer whose time steps a program computes one by one.

    Args:
        name: Dotted module path; empty for the root.
        kind: ``LSTM`` or ``GRU``.
        initial_cells: Of an LSTM the names of the nodes that are the initial cell state, one for
            each layer and direction of each call, in the order of the graph. Empty for a GRU.
    """

    name: str
    kind: Kind
    initial_cells: tuple[str, ...] = ()

    def key(self, tensor: str) -> str:
        """The key of one of its quantized tensors, such as ``weight_ih_l0``."""
        return f"{self.name}.{tensor}" if self.name else tensor

    def nodes(self, program: ExportedProgram) -> tuple[fx.Node, ...]:
        """The nodes that the layer's own forward made, in all calls, in the order of the graph."""
        calls = (node for node in program.graph.nodes if node.op == "call_function")
        return tuple(node for node in calls if module_path(node) == self.name)


_LAYER_CLASSES: dict[str, Kind] = {"LSTMQAT": "LSTM", "GRUQAT": "GRU"}


def recurrences_of_old_file(program: ExportedProgram) -> tuple[Recurrence, ...]:
    """Find the recurrent layers in a ``.pt2`` file that does not list them.

    Files of versions before ``QuantizedModel.recurrences`` say it only through the class names in
    ``nn_module_stack`` and the operators of one step, both as they were in those versions. Nothing
    but ``QuantizedModel.load`` calls this function.
    """
    kinds: dict[str, Kind] = {}
    cells: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        stack: list[Any] = list((node.meta.get("nn_module_stack") or {}).values())
        kind = _LAYER_CLASSES.get(str(stack[-1][1]).rpartition(".")[2]) if stack else None
        if kind is None:
            continue
        name = module_path(node)
        kinds.setdefault(name, kind)
        cell = _initial_cell_of_old_step(node) if kind == "LSTM" else None
        if cell is not None:
            cells.setdefault(name, []).append(cell.name)
    return tuple(Recurrence(name, kind, tuple(cells.get(name, ()))) for name, kind in kinds.items())


def _initial_cell_of_old_step(product: fx.Node) -> fx.Node | None:
    """The initial cell state, from a layer's first product with its hidden state.

    That step computes ``i, f, g, o = (x + product).chunk(4, -1)`` and ``f.sigmoid() * cell``. The
    cell state of every later step is a sum.
    """
    aten: Any = torch.ops.aten
    if product.target is not aten.linear.default or len(product.users) != 1:
        return None
    (gates,) = product.users
    chunks = [user for user in gates.users if user.target is aten.chunk.default]
    if gates.target is not aten.add.Tensor or len(chunks) != 1:
        return None
    forget = next(part for part in chunks[0].users if part.args[1] == 1)
    (sigmoid,) = forget.users
    (keep,) = sigmoid.users
    cell = keep.args[1]
    is_first = isinstance(cell, fx.Node) and cell.target is not aten.add.Tensor
    return cell if is_first else None  # type: ignore[return-value]
