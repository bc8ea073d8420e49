"""Write linear layers whose output has no grid in the form that ONNX Runtime computes on integers.

It fuses DequantizeLinear and MatMul of three dimensions to MatMulIntegerToFloat. Of MatMul and Add
in two it makes a Gemm first, which becomes QGemm between two grids only and else stays float.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.onnx_files.graph_writer import initializer
from lightning_qat_exporters.qdq.translate import KEY


def gemm_as_matmul(graph: ir.Graph) -> None:
    """Turn every Gemm on integers whose result is not quantized into a 3-D MatMul, in place.

    Biases stay float. One transposed weight serves all calls of a layer (the steps of an RNN).
    """
    transposed: dict[ir.Value, ir.Value] = {}
    axis = initializer(graph, "first_axis", np.array([0]))
    for node in list(graph):
        if node.op_type != "Gemm" or not _is_plain(node) or _is_quantized(node.outputs[0]):
            continue
        x, weight = node.inputs[:2]
        if x is None or weight is None or not (_dequantized(x) and _dequantized(weight)):
            continue
        if node.attributes.get_int("transB", 0):
            if weight not in transposed:
                transposed[weight] = _transposed(graph, node, weight)
            weight = transposed[weight]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        rows = _before(graph, node, "Unsqueeze", [x, axis])
        result = _before(graph, node, "MatMul", [rows, weight])
        if bias is not None:
            result = _before(graph, node, "Add", [result, bias])
        result = _before(graph, node, "Squeeze", [result, axis])
        name, shape = node.outputs[0].name, node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        node.outputs[0].name, result.name, result.shape = f"{name}.Gemm", name, shape
        graph.remove(node, safe=True)


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm is ``x @ w + b`` or ``x @ w.T + b``."""
    get = node.attributes.get_float
    return get("alpha", 1.0) == get("beta", 1.0) == 1.0 and not node.attributes.get_int("transA", 0)


def _is_quantized(value: ir.Value) -> bool:
    """Whether all that reads a value quantizes it, perhaps behind the relu that Q saturates to."""
    readers = [usage.node for usage in value.uses()]
    if not readers or value.is_graph_output():
        return False
    return all(
        reader.op_type == "QuantizeLinear"
        or (reader.op_type == "Relu" and _is_quantized(reader.outputs[0]))
        for reader in readers
    )


def _dequantized(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _transposed(graph: ir.Graph, before: ir.Node, weight: ir.Value) -> ir.Value:
    node = ir.Node("", "Transpose", [weight], [ir.AttrInt64s("perm", [1, 0])])
    producer = weight.producer()
    assert producer is not None
    node.metadata_props[KEY] = producer.metadata_props.get(KEY, "")
    node.outputs[0].name = f"{weight.name}.turned"
    node.outputs[0].type = weight.type
    if weight.shape is not None:
        node.outputs[0].shape = ir.Shape(list(weight.shape)[::-1])
    graph.insert_before(before, node)
    return node.outputs[0]


def _before(graph: ir.Graph, node: ir.Node, kind: str, inputs: list[ir.Value]) -> ir.Value:
    """The result of a new node of the module that made another one."""
    new = ir.Node("", kind, inputs)
    new.metadata_props.update(node.metadata_props)
    new.outputs[0].name = f"{node.outputs[0].name}.{kind}"
    new.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, new)
    return new.outputs[0]
