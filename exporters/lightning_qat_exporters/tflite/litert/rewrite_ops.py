"""Rewrite operators that LiteRT computes in float only, or rounds twice, to integer operators.

==========================  ======================================================================
torch                       in the file
==========================  ======================================================================
average pools               DEPTHWISE_CONV_2D of equal weights, where input and output have scales
                            of their own; MUL at the border where padding is not counted
prelu with one slope        LEAKY_RELU; with one per channel it stays float, for the slopes have no
                            grid
hardsigmoid                 ADD of 3 with relu6, MUL by a sixth
repeat, tile                CONCATENATION: litert-torch repeats pictures along another axis
transposed convolutions     TRANSPOSE_CONV, CONV_3D_TRANSPOSE, and a SLICE where torch cuts padding
==========================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.ops import as_dequantize, make_dequantize
from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.decompose.average_pool import (
    Pool,
    adaptive_avg_pool2d,
    average_pool,
    avg_pool2d,
)
from lightning_qat_exporters.tflite.decompose.conv_transpose import (
    TransposedConvolution,
    conv_transpose,
)
from lightning_qat_exporters.tflite.decompose.hardsigmoid import hardsigmoid
from lightning_qat_exporters.tflite.litert.requantize import Annotated, PlainQParams, kind

_ATEN = torch.ops.aten
_TRANSPOSE_CONV = torch.ops.lightning_qat_litert.transpose_conv.default
_TRANSPOSED = (_ATEN.conv_transpose1d, _ATEN.conv_transpose2d, _ATEN.conv_transpose3d)
_BINARY = {"add": _ATEN.add.Tensor, "mul": _ATEN.mul.Tensor}


def rewrite_ops(
    annotated: Annotated, tensors: Mapping[str, QuantizedTensor]
) -> dict[str, QuantizedTensor]:
    """Rewrite a graph in place.

    Args:
        annotated: The graph with its qparams.
        tensors: The model's, by key.

    Returns:
        Every constant that was added, by the key of its ``dequantize`` node.
    """
    constants: dict[str, QuantizedTensor] = {}
    for node in list(annotated.graph.nodes):
        with annotated.graph.inserting_before(node):
            new = _rewritten(_Writer(annotated, node, constants), node, tensors)
        if new is not None:
            node.replace_all_uses_with(new)
            annotated.graph.erase_node(node)
    return constants


def _rewritten(
    writer: _Writer, node: fx.Node, tensors: Mapping[str, QuantizedTensor]
) -> fx.Node | None:
    """The node that replaces an operator; ``None``: the operator stays."""
    if kind(node) in _TRANSPOSED:
        return _conv_transpose(writer, node, tensors)
    if kind(node) in (_ATEN.repeat, _ATEN.tile):
        return _repeat(writer, node)
    if kind(node) is _ATEN.prelu:
        return _prelu(writer, node)
    source, output = writer.annotated.source(node), writer.annotated.output(node)
    if source is None or output is None or output.grid.dtype is not torch.int8:
        return None
    x: Any = node.args[0] if node.args else None
    if kind(node) is _ATEN.hardsigmoid:
        result: fx.Node = hardsigmoid(writer, x, node.name, output.as_qparams())
        return result
    pool = None if source == output else _pool_of(node)
    if pool is None:
        return None
    shape = tuple(x.meta["val"].shape)
    mean: fx.Node = average_pool(writer, x, node.name, pool, shape, output.as_qparams())
    return mean


def _pool_of(node: fx.Node) -> Pool | None:
    """The average pool that an operator is; ``None``: another operator, or one left as it is."""
    try:
        if kind(node) is _ATEN.avg_pool2d:
            return avg_pool2d(node)
        if kind(node) is _ATEN.adaptive_avg_pool2d and _size(node) != (1, 1):
            return adaptive_avg_pool2d(_size(node.args[0]), _size(node))
    except CannotExpress:
        # litert-torch has float operators for it.
        return None
    return None


def _prelu(writer: _Writer, node: fx.Node) -> fx.Node | None:
    """A leaky relu where the slope is one number; litert-torch has four operators for prelu."""
    x, weight = arguments_of(node)
    if weight.op != "get_attr":
        return None
    slope = attrgetter(weight.target)(writer.annotated.graph.owning_module)
    if slope.numel() != 1:
        return None
    return writer.call(_ATEN.leaky_relu.default, x, float(slope))


def _repeat(writer: _Writer, node: fx.Node) -> fx.Node | None:
    """Concatenations; ``None`` where it is as often as the batch is large, which is one sample."""
    x, times = arguments_of(node)
    if not all(isinstance(count, int) for count in times):
        return None
    rank = len(x.meta["val"].shape)
    times = [1] * (rank - len(times)) + list(times)
    for _ in range(len(times) - rank):
        x = writer.call(_ATEN.unsqueeze.default, x, 0)
    for axis, count in enumerate(times):
        if count != 1:
            x = writer.call(_ATEN.cat.default, [x] * count, axis)
    result: fx.Node = x
    return result


def _conv_transpose(
    writer: _Writer, node: fx.Node, tensors: Mapping[str, QuantizedTensor]
) -> fx.Node | None:
    """A layer with integer weights; one in float is left to litert-torch."""
    x, weight, bias = arguments_of(node)[:3]
    weight = as_dequantize(weight)
    if weight is None:
        return None
    tensor, output = tensors[weight.key], writer.annotated.output(node)
    assert tensor.integers is not None
    size = tuple(int(n) for n in x.meta["val"].shape[2:])
    plan = conv_transpose(node, tensor.integers, tensor.qparams, size)
    if plan.one_dimensional:
        x = writer.call(_ATEN.unsqueeze.default, x, 2)
    rank = plan.integers.dim()
    y = writer.call(_ATEN.permute.default, x, [0, *range(2, rank), 1])
    stored = writer.constant(_in_litert_order(f"{node.name}.weight", plan, tensor.qparams))
    inputs, outputs = plan.integers.shape[:2]
    if rank == 5:
        zeros = writer.zeros(f"{node.name}_zeros", inputs)
        y = writer.call(_TRANSPOSE_CONV, y, stored, zeros, plan.stride, plan.size)
        y = y if bias is None else writer.call(_ATEN.add.Tensor, y, bias)
    else:
        bias = writer.zeros(f"{node.name}_bias", outputs) if bias is None else bias
        y = writer.call(_TRANSPOSE_CONV, y, stored, bias, plan.stride, plan.size)
        # Before what cuts and permutes the result, so that the kernel rounds.
        y = y if output is None else writer.annotated.quantize(y, output)
    for axis, start, end in plan.cuts:
        y = writer.call(_ATEN.slice.Tensor, y, 1 + axis, start, end)
    y = writer.call(_ATEN.permute.default, y, [0, rank - 1, *range(1, rank - 1)])
    return writer.call(_ATEN.squeeze.dim, y, 2) if plan.one_dimensional else y


def _in_litert_order(key: str, plan: TransposedConvolution, qparams: QParams) -> QuantizedTensor:
    """The dense weight, its axes as LiteRT has them."""
    order = (1, 2, 3, 0) if plan.integers.dim() == 4 else (2, 3, 4, 1, 0)
    axis = None if qparams.axis is None else order.index(1)
    zero_point = torch.zeros_like(plan.scale, dtype=torch.int32)
    stored = QParams(plan.scale, zero_point, qparams.grid, axis)
    return QuantizedTensor(key, "weight", stored, plan.integers.permute(order).contiguous())


class _Writer:
    """Adds operators in front of one that they replace: the ``Builder`` of this backend.

    An output is quantized when another operator reads it; the last one is quantized by the graph.
    """

    def __init__(
        self, annotated: Annotated, node: fx.Node, constants: dict[str, QuantizedTensor]
    ) -> None:
        self.annotated, self._node, self._constants = annotated, node, constants
        self._outputs: dict[fx.Node, QParams] = {}

    def constant(self, tensor: QuantizedTensor) -> fx.Node:
        self._constants[tensor.key] = tensor
        assert tensor.integers is not None
        return make_dequantize(self.annotated.graph, tensor.integers, tensor.qparams, tensor.key)

    def binary(
        self,
        function: Literal["add", "mul"],
        x: fx.Node,
        y: fx.Node,
        output: QParams,
        activation: Literal["none", "relu6"] = "none",
    ) -> fx.Node:
        result = self.call(_BINARY[function], self._quantized(x), y)
        if activation == "relu6":
            result = self.call(_ATEN.hardtanh.default, result, 0.0, 6.0)
        self._outputs[result] = output
        return result

    def depthwise(
        self,
        x: fx.Node,
        weight: QuantizedTensor,
        stride: list[int],
        padding: list[int],
        output: QParams,
    ) -> fx.Node:
        assert weight.integers is not None
        options = (None, stride, padding, [1, 1], weight.integers.shape[0])
        result = self.call(_ATEN.conv2d.default, x, self.constant(weight), *options)
        self._outputs[result] = output
        return result

    def zeros(self, name: str, count: int) -> fx.Node:
        module: Any = self.annotated.graph.owning_module
        module.register_buffer(name, torch.zeros(count))
        return self.annotated.graph.get_attr(name)

    def call(self, target: Any, *args: Any) -> fx.Node:
        new = self.annotated.graph.call_function(target, args)
        new.meta["val"] = self._node.meta["val"]
        return new

    def _quantized(self, x: fx.Node) -> fx.Node:
        output = self._outputs.get(x)
        return x if output is None else self.annotated.quantize(x, PlainQParams.of(output))


def _size(node: Any) -> tuple[int, ...]:
    """Height and width of a picture."""
    return tuple(int(n) for n in node.meta["val"].shape[-2:])
