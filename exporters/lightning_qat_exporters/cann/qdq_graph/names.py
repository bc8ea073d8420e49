"""Names of tensors and nodes."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lightning_qat_exporters.qdq.build import module_of


def label(node: ir.Node) -> str:
    """A node's name, else its output's, else its operator."""
    return node.name or node.outputs[0].name or node.op_type


def place_of(node: ir.Node) -> str:
    """The dotted path of the module that a node is from, with its operator; else ``label``.

    Nodes that we wrote are named by their module. Those of other tools may be called ``n2_3``, and
    torch's exporter notes the module beside that.
    """
    path, name = module_of(node), label(node)
    if not path or name == path or name.startswith((f"{path}/", f"{path}.")):
        return name
    return f"{path}/{node.op_type} ({name})"


def reader_label(quantizes: Iterable[ir.Node], dequantizes: Iterable[ir.Node]) -> str:
    """Name of the first node that reads a quantized tensor; else of the graph output that it is."""
    outputs = [node.outputs[0] for node in (*dequantizes, *quantizes)]
    readers = [usage.node for value in outputs for usage in value.uses()]
    outside = [n for n in readers if n.op_type not in ("Clip", "DequantizeLinear")]
    if outside:
        return label(outside[0])
    named = [value.name for value in outputs if value.is_graph_output() and value.name]
    return named[0] if named else "activation"
