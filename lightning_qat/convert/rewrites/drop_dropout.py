"""Remove what does nothing in an evaluating graph: dropout, and ``cat`` of one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram

_ATEN = torch.ops.aten

_DROPOUTS = (
    _ATEN.dropout.default,
    _ATEN.feature_dropout.default,
    _ATEN.alpha_dropout.default,
    _ATEN.feature_alpha_dropout.default,
)


def drop_dropout(program: ExportedProgram) -> None:
    """Remove every dropout that does nothing, in place, so that it separates no two operators.

    A forward may keep dropout on in eval mode (Monte-Carlo dropout): that one stays.
    """
    for node in list(program.graph.nodes):
        if node.target in _DROPOUTS and node.args[2] is False:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)


def drop_single_cat(program: ExportedProgram) -> None:
    """Remove every ``cat`` of one tensor, in place.

    ``torch.onnx`` drops it too, and would leave two quantizations in a row.
    """
    for node in list(program.graph.nodes):
        parts: Any = node.args[0] if node.target is _ATEN.cat.default else ()
        if len(parts) == 1:
            node.replace_all_uses_with(parts[0])
            program.graph.erase_node(node)
