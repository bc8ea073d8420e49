"""Questions that the rules ask of a QDQ graph."""

from __future__ import annotations

import onnx_ir as ir

PAIR = ("QuantizeLinear", "DequantizeLinear")
CONVOLUTIONS = ("Conv", "ConvTranspose")
WEIGHTED = (*CONVOLUTIONS, "Gemm", "MatMul")
"""Operators that TensorRT calls weighted: their data and weight are quantized."""

_TRANSPARENT = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def name_of(node: ir.Node) -> str:
    """The node's name, or that of its output."""
    return node.name or node.outputs[0].name or node.op_type


def reads_pair(value: ir.Value | None) -> bool:
    """Whether a value comes out of DequantizeLinear."""
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value depends on initializers and Constant nodes alone."""
    while value is not None:
        if value.const_value is not None or value.is_initializer():
            return True
        producer = value.producer()
        if producer is None or producer.op_type not in (*_TRANSPARENT, *PAIR, "Constant"):
            return False
        if producer.op_type == "Constant":
            return True
        value = producer.inputs[0]
    return False


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, one entry per use."""
    return [usage.node for usage in value.uses()]


def behind_pair(value: ir.Value | None) -> ir.Value | None:
    """What is quantized and dequantized to a value; the value itself where it is no pair's."""
    for kind in reversed(PAIR):
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != kind:
            return value
        value = producer.inputs[0]
    return value


def weighted_source(value: ir.Value | None) -> ir.Node | None:
    """The convolution or product whose only reader makes a value, its bias added or not."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Add":
        # MatMul and its bias.
        parts = [part for part in node.inputs if not is_constant(part)]
        node = parts[0].producer() if len(parts) == 1 and parts[0] is not None else None
        if node is not None and len(readers(node.outputs[0])) != 1:
            return None
    if node is None or node.op_type not in WEIGHTED or value is None:
        return None
    return node if len(readers(value)) == 1 else None
