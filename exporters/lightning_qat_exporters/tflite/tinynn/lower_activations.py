"""Lower activation functions to integer operators."""

from __future__ import annotations

import torch
from torch import fx

from lightning_qat.ir.operators import fixed_scale_and_zero_point
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.decompose.hardsigmoid import hardsigmoid as decomposed
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import broken_limit
from lightning_qat_exporters.tflite.tinynn.lowering import (
    INT8,
    LowerFunction,
    Lowering,
    Value,
)
from lightning_qat_exporters.tflite.tinynn.lowering_builder import LoweringBuilder
from lightning_qat_exporters.tflite.tinynn.ops import OPS


def _fixed(name: str) -> QParams:
    scale, zero_point = fixed_scale_and_zero_point(name)
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), INT8)


# Output qparams that TFLite's specification fixes.
OF_SIGMOID, OF_SOFTMAX, OF_TANH = (_fixed(name) for name in ("sigmoid", "softmax", "tanh"))


def unary(function: str) -> LowerFunction:
    """Lower a function of ``UNARY`` whose output may have any qparams."""

    def lower(lowering: Lowering, node: fx.Node) -> Value:
        pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
        if pairs is None or output is None:
            return lowering.as_float(node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=output)

    return lower


def bounded(function: str, qparams: QParams) -> LowerFunction:
    """Lower a function whose output has fixed qparams."""

    def lower(lowering: Lowering, node: fx.Node) -> Value:
        pairs = lowering.quantized(node.args[0])
        if pairs is None or lowering.output_qparams(node) is None:
            return lowering.as_float(node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=qparams)

    return lower


def gelu(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.gelu``, exact or approximated by tanh."""
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return unary("gelu_tanh" if tanh else "gelu")(lowering, node)


def leaky_relu(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.leaky_relu``."""
    return _with_slope(lowering, node, float(arguments_of(node)[1]))


def prelu(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.prelu``: a leaky relu where its slope is one number, else in float.

    Slopes per channel have no grid, which an int8 kernel would need.
    """
    slope = lowering.constant(arguments_of(node)[1])
    if slope is None or slope.numel() != 1:
        return lowering.as_float(node)
    return _with_slope(lowering, node, float(slope))


def _with_slope(lowering: Lowering, node: fx.Node, slope: float) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        value = lowering.real(node.args[0])
        return Value(lowering.call(torch.ops.aten.leaky_relu.default, value, slope), None)
    return lowering.emit(OPS.leaky_relu.default, pairs[0][0], slope, qparams=output)


def silu(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``x * sigmoid(x)``: TFLite has no operator of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    x = pairs[0][0]
    gate = lowering.emit(OPS.unary.default, x, "sigmoid", qparams=OF_SIGMOID)
    return lowering.emit(OPS.binary.default, x, gate.node, "mul", "none", qparams=output)


def hardsigmoid(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``relu6(x + 3) / 6``: TFLite has no operator of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    return decomposed(LoweringBuilder(lowering), Value(*pairs[0]), node.name, output)


def softmax(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.softmax``."""
    pairs = lowering.quantized(node.args[0])
    if pairs is None or lowering.output_qparams(node) is None:
        return lowering.as_float(node)
    if broken_limit("SOFTMAX", [float(pairs[0][1].scale)], float(OF_SOFTMAX.scale), 8):
        return lowering.as_float(node)
    x, axis = arguments_of(node)[:2]
    axis %= len(lowering.shape(x))
    return lowering.emit(OPS.softmax.default, pairs[0][0], axis, qparams=OF_SOFTMAX)
