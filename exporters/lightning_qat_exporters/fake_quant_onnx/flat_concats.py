"""Concatenations of quantized tensors in a form that OpenVINO reads and computes right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.onnx_files.graph_writer import initializer, typed


def flatten_concats(graph: ir.Graph) -> None:
    """Concatenate flat what QuantizeLinear reads next, in place; the numbers are the same.

    OpenVINO (2026.4) moves DequantizeLinear through a Concat with a zero point per part. Where it
    then meets a linear layer behind an axis other than the last it refuses the file, and where it
    meets a convolution behind int8 tensors it computes something else, 30 to 100 steps off. So
    the axes from the concatenated one on become one, and a Reshape splits the result:

        Concat(a, b, axis)  ->  Reshape(Concat(Reshape(a), Reshape(b)))
    """
    for node in list(graph):
        if node.op_type == "Concat" and any(
            usage.node.op_type == "QuantizeLinear" for usage in node.outputs[0].uses()
        ):
            _flatten(graph, node)


def _flatten(graph: ir.Graph, node: ir.Node) -> None:
    result = node.outputs[0]
    shape = list(result.shape or ())
    axis = node.attributes.get_int("axis", 0) % max(len(shape), 1)
    if axis == len(shape) - 1 or not shape:
        return
    split = [0] * axis + [size if isinstance(size, int) else -1 for size in shape[axis:]]
    if split.count(-1) > 1 or 0 in split[axis:]:
        return
    flat = initializer(graph, f"flat_from_axis_{axis}", np.array([0] * axis + [-1], np.int64))
    parts = []
    for index, part in enumerate(node.inputs):
        reshape = ir.Node("", "Reshape", [part, flat], name=f"{node.name}.flat_{index}")
        parts.append(_typed_as(reshape, result, f"{result.name}.flat_{index}"))
        graph.insert_before(node, reshape)
    whole = ir.Node("", "Concat", parts, typed({"axis": axis}), name=f"{node.name}.flat")
    target = initializer(graph, f"{result.name}.shape", np.array(split, np.int64))
    joined = _typed_as(whole, result, f"{result.name}.flat")
    reshape = ir.Node("", "Reshape", [joined, target], name=node.name)
    new = _typed_as(reshape, result, None)
    new.shape = result.shape
    graph.insert_before(node, [whole, reshape])
    for made in (whole, reshape):
        made.metadata_props.update(node.metadata_props)
    new.name, result.name = result.name, None
    ir.convenience.replace_all_uses_with(result, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _typed_as(node: ir.Node, like: ir.Value, name: str | None) -> ir.Value:
    output = node.outputs[0]
    output.name, output.type = name, like.type
    return output
