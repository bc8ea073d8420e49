"""Record which nodes of a captured graph are recurrent layers, while it is being captured."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.ir.exported_program import module_path
from lightning_qat.ir.recurrence import Kind, Recurrence
from lightning_qat.layers._recurrent import Cell, EveryStep, RecurrentQAT, State
from lightning_qat.layers.recurrent import GRUQAT, LSTMQAT

_KINDS: dict[type[RecurrentQAT], Kind] = {LSTMQAT: "LSTM", GRUQAT: "GRU"}


@torch.library.custom_op("lightning_qat::initial_cell", mutates_args=())
def _initial_cell(c: Tensor) -> Tensor:
    """Mark the initial cell state of an LSTM; ``take_recurrences`` removes the mark."""
    return c.clone()


@_initial_cell.register_fake
def _(c: Tensor) -> Tensor:
    return torch.empty_like(c)


def mark_recurrences(model: nn.Module) -> None:
    """Let every LSTM of a finalized copy mark its initial cell state when it is captured."""
    for layer in model.modules():
        if type(layer) is LSTMQAT:
            layer._cell = _with_mark(layer)  # type: ignore[method-assign, assignment]


def take_recurrences(program: ExportedProgram, model: nn.Module) -> tuple[Recurrence, ...]:
    """List the recurrent layers of a captured program, and remove the marks from its graph.

    Args:
        program: Captured from ``model`` after ``mark_recurrences``; changed in place.
        model: The finalized copy, whose modules tell which paths are recurrent layers.
    """
    kinds: dict[str, Kind] = {
        name: _KINDS[type(module)]
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RecurrentQAT) and type(module) in _KINDS
    }
    cells: dict[str, list[str]] = {}
    for node in list(program.graph.nodes):
        name = module_path(node)
        if node.op != "call_function" or name not in kinds:
            continue
        found = cells.setdefault(name, [])
        if node.target is torch.ops.lightning_qat.initial_cell.default:
            cell = node.args[0]
            found.append(cell.name)
            node.replace_all_uses_with(cell)
            program.graph.erase_node(node)
    return tuple(Recurrence(name, kinds[name], tuple(found)) for name, found in cells.items())


def _with_mark(layer: LSTMQAT) -> Callable[[str, Sequence[EveryStep]], Cell]:
    """The layer's ``_cell``, whose first step marks the cell state that it reads."""
    make = layer._cell

    def cell(ending: str, quantize: Sequence[EveryStep]) -> Cell:
        step, first = make(ending, quantize), True

        def marked(x: Tensor, state: State) -> State:
            nonlocal first
            if first:
                h, c = state
                state, first = (h, _initial_cell(c)), False
            return step(x, state)

        return marked

    return cell
