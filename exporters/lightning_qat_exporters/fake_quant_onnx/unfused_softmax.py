"""Softmax in a form that ONNX Runtime's default session computes right."""

from __future__ import annotations

import math

import onnx_ir as ir

from lightning_qat_exporters.onnx_files.graph_writer import array_of

_LARGEST_RATIO = math.exp(5)


def unfuse_softmax(graph: ir.Graph) -> None:
    """Write ``Softmax -> Abs -> QuantizeLinear`` where its integer kernel would overflow, in place.

    Between DequantizeLinear and QuantizeLinear ONNX Runtime (1.31) makes QLinearSoftmax of it. That
    takes ``exp`` from a table whose largest entry is the largest float32 over ``exp(5) * n``, where
    n values are summed, and multiplies entries with ``1 / scale``: below ``scale = 1 / 148 n`` the
    product is infinite and the result 0. Learned ranges get there, and 1/256 of a single value.
    Abs changes nothing, as no result is negative, and is fused with nothing.
    """
    for node in list(graph):
        if node.op_type != "Softmax" or node.domain:
            continue
        maker = node.inputs[0].producer() if node.inputs[0] else None
        readers = node.outputs[0].consumers()
        scales = [_scale(reader) for reader in readers if reader.op_type == "QuantizeLinear"]
        if maker is None or maker.op_type != "DequantizeLinear" or len(scales) != len(readers):
            continue
        if any(1 / scale > _LARGEST_RATIO * _summed(node) for scale in scales if scale):
            _insert_abs(graph, node)


def _scale(quantize: ir.Node) -> float:
    values = array_of(quantize.inputs[1])
    return 0.0 if values is None else float(values.min())


def _summed(node: ir.Node) -> int:
    """How many values are summed; 1, the worst, where that is known only at run time."""
    shape = node.outputs[0].shape
    axis = node.attributes.get_int("axis", -1)
    size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
    return size if isinstance(size, int) else 1


def _insert_abs(graph: ir.Graph, node: ir.Node) -> None:
    result = node.outputs[0]
    magnitude = ir.Node("", "Abs", [result], name=f"{node.name}.abs")
    made = magnitude.outputs[0]
    made.name, made.type, made.shape = f"{result.name}.abs", result.type, result.shape
    magnitude.metadata_props.update(node.metadata_props)
    for usage in tuple(result.uses()):
        if usage.node is not magnitude:
            usage.node.replace_input_with(usage.idx, made)
    graph.insert_after(node, magnitude)
