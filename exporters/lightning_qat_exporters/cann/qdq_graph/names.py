"""Names of tensors and nodes."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir


def label(node: ir.Node) -> str:
    """A node's name, else its output's, else its operator."""
    return node.name or node.outputs[0].name or node.op_type


def reader_label(quantizes: Iterable[ir.Node], dequantizes: Iterable[ir.Node]) -> str:
    """Name of the first node that reads a quantized tensor; else of the graph output that it is."""
    outputs = [node.outputs[0] for node in (*dequantizes, *quantizes)]
    readers = [usage.node for value in outputs for usage in value.uses()]
    outside = [n for n in readers if n.op_type not in ("Clip", "DequantizeLinear")]
    if outside:
        return label(outside[0])
    named = [value.name for value in outputs if value.is_graph_output() and value.name]
    return named[0] if named else "activation"
