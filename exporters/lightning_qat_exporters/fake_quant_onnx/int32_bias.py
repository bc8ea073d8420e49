"""Biases as int32 with the scale of input times weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from lightning_qat.numerics.arithmetic import accumulator_scale, quantize_bias
from lightning_qat_exporters.onnx_files.graph_writer import array_of, initializer
from lightning_qat_exporters.qdq.build import layer_of


def quantize_biases(graph: ir.Graph) -> None:
    """Store the bias of every quantized layer on the grid of its accumulator."""
    for node in list(graph):
        if layer_of(node) is None or node.op_type == "MatMul" or len(node.inputs) < 3:
            continue
        bias = array_of(node.inputs[2])
        scale_input, scale_weight = (_scale_of(value) for value in node.inputs[:2])
        if bias is None or scale_input is None or scale_weight is None:
            continue
        integers = quantize_bias(torch.from_numpy(bias.copy()), scale_input, scale_weight).numpy()
        limits = np.iinfo(np.int32)
        if integers.min() < limits.min or integers.max() > limits.max:
            # Saturating a bias would change the function; a float bias is exact.
            continue
        scale = accumulator_scale(scale_input, scale_weight, len(integers)).numpy()
        constants = [
            initializer(graph, f"{node.name}.bias_int32", integers.astype(np.int32)),
            initializer(graph, f"{node.name}.bias_int32_scale", scale),
        ]
        name = f"{node.name}.bias.DequantizeLinear"
        axis = ir.AttrInt64("axis", 0)
        dequantize = ir.Node("", "DequantizeLinear", constants, [axis], name=name)
        dequantize.outputs[0].name = f"{node.name}.bias.real"
        graph.insert_before(node, dequantize)
        old = node.inputs[2]
        node.replace_input_with(2, dequantize.outputs[0])
        if old is not None and old.name is not None and not old.uses():
            graph.initializers.pop(old.name)


def _scale_of(value: ir.Value | None) -> torch.Tensor | None:
    producer = None if value is None else value.producer()
    scale = None if producer is None else array_of(producer.inputs[1])
    return None if scale is None else torch.from_numpy(scale.copy())
