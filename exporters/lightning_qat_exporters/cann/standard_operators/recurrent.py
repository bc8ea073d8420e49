"""The device nodes for LSTM and GRU as standard operators.

What the input gives to the gates is an exact product of integers for all steps at once; ONNX's own
LSTM and GRU, with the identity as their weight, do the rest in float32. As in AMCT's simulation the
initial hidden state is rounded and later ones are not: kernels require one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress
from lightning_qat_exporters.cann.standard_operators.layers import unpacked, write_product
from lightning_qat_exporters.cann.standard_operators.node_writer import NodeWriter
from lightning_qat_exporters.cann.standard_operators.quantize_nodes import Centered, write_levels
from lightning_qat_exporters.onnx_files.graph_writer import array_of

RECURRENT = {"BasicLSTMInplaceFillWindowCache": "LSTM", "BasicGRUInplaceFillWindowCache": "GRU"}
"""The device nodes and ONNX's operators of the same cell, their gates in the same order."""

# The attributes with the one value that is defined here.
_FIXED: Mapping[str, Any] = {
    "direction": "forward",
    "clip": -1.0,
    "input_forget": 0,
    "linear_before_reset": 1,
    "quant_sqrt_mode_x": 0,
    "quant_sqrt_mode_h": 0,
    "quant_dtype": 2,
}


def write_recurrent(write: NodeWriter, node: ir.Node, features: int | None) -> list[ir.Value]:
    """The outputs ``[time, 1, batch, hidden]``, the last hidden state and an LSTM's cell state.

    Args:
        write: For this node.
        node: The device node.
        features: Of its input, where they are known; see ``write_layer``.

    Raises:
        CannotExpress: An attribute has a value that is not defined here, or weights, biases or the
            dequant parameter are no constants.
    """
    for name, value in _FIXED.items():
        got = node.attributes[name].value if name in node.attributes else value
        if got != value:
            raise CannotExpress(f"{name} must be {value}; got {got}")
    needed = ("hidden_size", *(f"quant_{f}_{v}" for v in "xh" for f in ("scale", "offset")))
    missing = [name for name in needed if name not in node.attributes]
    if missing:
        raise CannotExpress(f"it must have the attributes {missing}")
    kind = RECURRENT[node.op_type]
    x, h, cell = node.inputs[0], node.inputs[3], node.inputs[4:-4]
    assert x is not None
    assert h is not None
    hidden = node.attributes.get_int("hidden_size", 0)
    weight, recurrent, bias, param = (array_of(node.inputs[index]) for index in (1, 2, -4, -1))
    if (
        weight is None
        or recurrent is None
        or param is None
        or (bias is None and node.inputs[-4] is not None)
    ):
        raise CannotExpress("weights, biases and the dequant parameter must be constants")
    weight = unpacked(weight, 2) if features == 2 * weight.shape[2] else weight
    recurrent = unpacked(recurrent, 2) if hidden == 2 * recurrent.shape[2] else recurrent
    rows = weight.shape[1]
    scales = param.astype(np.uint64).astype(np.uint32).view(np.float32)
    of_x, of_h = (np.repeat(part, rows // part.size) for part in np.split(scales, 2))
    biases = np.zeros(2 * rows, np.int32) if bias is None else bias.reshape(-1)

    data = _quantized(write, node, x, "x")
    gates = write_product(
        write, data, weight[0].T, biases[:rows], 1, lambda a, w: write("MatMul", a, w)
    )
    gates = write("Mul", write.cast(gates, ir.DataType.FLOAT), of_x)
    step = np.float32(node.attributes.get_float("quant_scale_h", 0.0))
    state = write("Mul", _quantized(write, node, h, "h").value, np.float32(1) / step)
    real = recurrent.astype(np.float32) * step * of_h[:, None]
    first = _cell(write, kind, hidden, gates, real, biases[rows:] * of_h, [state, *cell])
    made = first.producer()
    assert made is not None  # written above
    return list(made.outputs)


def _quantized(write: NodeWriter, node: ir.Node, value: ir.Value, letter: str) -> Centered:
    scale = node.attributes.get_float(f"quant_scale_{letter}", 0.0)
    offset = node.attributes.get_float(f"quant_offset_{letter}", 0.0)
    steps = write("Round", write("Mul", value, np.float32(scale)))
    return write_levels(write, steps, offset, ir.DataType.INT8)[1]


def _cell(
    write: NodeWriter,
    kind: str,
    hidden: int,
    gates: ir.Value,
    recurrent: Array,
    bias: Array,
    states: list[ir.Value | None],
) -> ir.Value:
    """ONNX's LSTM or GRU over gates that have all of the input's part; its first output."""
    rows = len(recurrent[0])
    both = np.concatenate((np.zeros(rows), bias))[None].astype(np.float32)
    identity = np.eye(rows, dtype=np.float32)[None]
    attributes: dict[str, Any] = {
        "hidden_size": hidden,
        **({"linear_before_reset": 1} if kind == "GRU" else {}),
    }
    inputs = gates, identity, recurrent, both, None, *states
    return write(kind, *inputs, outputs=1 + len(states), **attributes)
