"""Names of tensors and nodes, unique in a graph."""

from __future__ import annotations

import onnx_ir as ir


def unique(name: str, taken: set[str]) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, ... if taken, and take it.

    >>> taken = {"fc"}
    >>> unique("fc", taken), unique("fc", taken)
    ('fc_1', 'fc_2')
    """
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def label(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type
