"""Weights of grouped transposed convolutions: DequantizeLinear has scales along one axis only.

Integers are stored as those of a convolution, ``(out, in / groups, *kernel)``, with a scale for
each row; behind DequantizeLinear they become ``(in, out / groups, *kernel)`` again.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from torch import Tensor

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.arithmetic import channel_groups, channels_first
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, initializer


def stored_form(tensor: QuantizedTensor) -> tuple[Tensor, int | None]:
    """The integers of a weight as a file stores them, and the axis of their scales."""
    integers, qparams = tensor.integers, tensor.qparams
    assert integers is not None
    groups = channel_groups(qparams.scale, integers.shape, qparams.axis)
    if groups == 1:
        return integers, qparams.axis
    return channels_first(integers, groups), 0


def restore_order(graph: ir.Graph, dequantize: ir.Node, tensor: QuantizedTensor, key: str) -> None:
    """Bring the real weight back to the order that ConvTranspose takes, in place."""
    integers, qparams = tensor.integers, tensor.qparams
    assert integers is not None
    groups = channel_groups(qparams.scale, integers.shape, qparams.axis)
    if groups == 1:
        return
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
    (inputs, outputs, *kernel), real = integers.shape, dequantize.outputs[0]
    rows = channels_first(integers, groups)
    real.shape = ir.Shape(list(rows.shape))
    moved = outputs > 1 and inputs > groups
    if rows.shape == integers.shape and not moved:
        return
    writer, uses, anchor = GraphWriter(graph), list(real.uses()), dequantize
    steps: list[tuple[str, list[int]]] = [("Reshape", [inputs, outputs, *kernel])]
    if moved:
        order = [0, 2, 1, *range(3, 3 + len(kernel))]
        blocks = [groups, outputs, inputs // groups, *kernel]
        steps = [("Reshape", blocks), ("Transpose", order), *steps]
    value = real
    for number, (kind, numbers) in enumerate(steps):
        name = f"{key}.{kind}_{number}"
        shape = [value.shape[a] for a in numbers] if kind == "Transpose" else numbers  # type: ignore[index]
        operands, attributes = [value], {"perm": numbers}
        if kind == "Reshape":
            sizes = initializer(graph, f"{name}.shape", np.array(numbers, np.int64))
            operands, attributes = [value, sizes], {}
        value = writer.insert(anchor, kind, operands, attributes, name, after=True)
        value.shape = ir.Shape(shape)
        producer = value.producer()
        assert producer is not None
        anchor = producer
    for user, index in uses:
        user.replace_input_with(index, value)
