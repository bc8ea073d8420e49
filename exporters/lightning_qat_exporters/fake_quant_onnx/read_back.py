"""Compare a QDQ file's integers and scales with the converted model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch

from lightning_qat.export.protocol import Array
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat_exporters.qdq.build import FULL_GRIDS
from lightning_qat_exporters.qdq.grouped_weights import stored_form


def weight_differences(
    tensor: QuantizedTensor, nodes: list[onnx.NodeProto], stored: Mapping[str, Array]
) -> Iterator[str]:
    """Differences of a weight's nodes in a file from its integers, scale and axis."""
    for node in nodes:
        integers, (expected, axis) = stored[node.input[0]], stored_form(tensor)
        if node.input[0].endswith("_transposed"):
            integers, axis = integers.T, None if axis is None else 1 - axis
        yield from _compare("scale", stored[node.input[1]], tensor.qparams.scale)
        yield from _compare("integers", integers, expected)
        if len(node.input) > 2 and stored[node.input[2]].any():
            yield "the zero point of a weight must be 0"
        if axis is not None and _axis(node) != axis:
            yield f"the channel axis must be {axis}; the file has {_axis(node)}"


def activation_differences(
    tensor: QuantizedTensor, nodes: list[onnx.NodeProto], stored: Mapping[str, Array]
) -> Iterator[str]:
    """Differences of an activation's nodes in a file from its scale, zero point and grid."""
    grid = tensor.qparams.grid
    pairs = [n for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    shift = 0
    for node in pairs:
        zero_point = stored[node.input[2]]
        shift = 128 if zero_point.dtype == np.uint8 else 0
        yield from _compare("scale", stored[node.input[1]], tensor.qparams.scale)
        yield from _compare(
            "zero point", zero_point.astype(np.int32) - shift, tensor.qparams.zero_point
        )
    if sum(n.op_type == "QuantizeLinear" for n in pairs) * 2 != len(pairs):
        yield "QuantizeLinear and DequantizeLinear must come in pairs"
    clips = [n for n in nodes if n.op_type == "Clip"]
    full = (grid.qmin, grid.qmax) in FULL_GRIDS
    if not full and len(clips) * 2 != len(pairs):
        yield f"a Clip to {grid.qmin} .. {grid.qmax} must stand between Q and DQ"
    for clip in clips:
        bounds = tuple(int(stored[name]) - shift for name in clip.input[1:])
        if bounds != (grid.qmin, grid.qmax):
            yield f"the grid must be {grid.qmin} .. {grid.qmax}; the file clips to {bounds}"


def bias_differences(
    model: QuantizedModel, proto: onnx.ModelProto, stored: Mapping[str, Array]
) -> Iterator[str]:
    """Differences of the biases in a file from those of the model's layers."""
    nodes = {node.name: node for node in proto.graph.node}
    made_by = {output: node for node in proto.graph.node for output in node.output}
    readers = {name: node for node in proto.graph.node for name in node.input}
    calls: Counter[str] = Counter()
    for layer in model.layers:
        name = f"{layer.name}_{calls[layer.name]}" if calls[layer.name] else layer.name
        calls[layer.name] += 1
        node = nodes.get(name or "layer")
        if node is None:
            yield f"{name}: the file has no layer of that name"
            continue
        if layer.bias is None:
            continue
        source = node.input[2] if len(node.input) > 2 else ""
        if node.op_type == "MatMul":
            added = readers[node.output[0]].input
            source = next(value for value in added if value != node.output[0])
        expected = layer.bias
        if not source:
            # torch.onnx leaves out a bias of zeros.
            if expected.any():
                yield f"{name}: the file has no bias"
            continue
        if source not in stored and made_by[source].op_type == "DequantizeLinear":
            source = made_by[source].input[0]
            scales = (model.tensors[k].qparams.scale for k in (layer.input_key, layer.weight_key))
            expected = quantize_bias(layer.bias, *scales).to(torch.int32)
        for text in _compare("the bias", stored[source], expected):
            yield f"{name}: {text}"


def _axis(node: onnx.NodeProto) -> int:
    return next((a.i for a in node.attribute if a.name == "axis"), 1)


def _compare(what: str, stored: Array, expected: Any) -> Iterator[str]:
    wanted = expected.numpy()
    if stored.shape != wanted.shape:
        yield f"{what} has shape {stored.shape}, the model {wanted.shape}"
    elif not np.array_equal(stored, wanted):
        count = int(np.sum(stored != wanted))
        yield f"{count} of {wanted.size} values of {what} differ from the model's"
