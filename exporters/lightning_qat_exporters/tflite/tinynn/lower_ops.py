"""The table of operators that are lowered: torch's operators to functions, one per operator.

An operator is lowered to its integer version if its inputs are quantized and its output is
quantized too. Joins and activations are computed in float otherwise, as torch does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.decompose.average_pool import (
    Pool,
    adaptive_avg_pool2d,
    average_pool,
    avg_pool1d,
    avg_pool2d,
)
from lightning_qat_exporters.tflite.flatbuffer.kernel_limits import broken_limit
from lightning_qat_exporters.tflite.tinynn.lower_activations import (
    OF_SIGMOID,
    OF_TANH,
    bounded,
    gelu,
    hardsigmoid,
    leaky_relu,
    prelu,
    silu,
    softmax,
    unary,
)
from lightning_qat_exporters.tflite.tinynn.lower_clamps import fused_activation
from lightning_qat_exporters.tflite.tinynn.lower_layers import (
    conv1d,
    conv2d,
    conv2d_padding,
    linear,
    transposed,
)
from lightning_qat_exporters.tflite.tinynn.lower_rows import as_picture, as_rows, resized
from lightning_qat_exporters.tflite.tinynn.lower_value_preserving import VALUE_PRESERVING, same
from lightning_qat_exporters.tflite.tinynn.lowering import LowerFunction, Lowering, Value
from lightning_qat_exporters.tflite.tinynn.lowering_builder import LoweringBuilder
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten


def _binary(lowering: Lowering, node: fx.Node) -> Value:
    pairs, output = lowering.quantized(*node.args[:2]), lowering.output_qparams(node)
    # `alpha`, which scales the second operand, is a keyword.
    if pairs is None or output is None or node.kwargs.get("alpha", 1) != 1:
        return lowering.as_float(node)
    name = str(node.target).removeprefix("aten.").split(".")[0]
    function = "matmul" if name in ("matmul", "bmm", "mm") else name
    scales = [float(pair[1].scale) for pair in pairs]
    if broken_limit(function.upper(), scales, float(output.scale), 8):
        return lowering.as_float(node)
    activation = "none" if function == "matmul" else fused_activation(lowering, node)
    nodes = [pair[0] for pair in pairs]
    return lowering.emit(OPS.binary.default, *nodes, function, activation, qparams=output)


def _mean(lowering: Lowering, node: fx.Node) -> Value:
    x, axes, keepdim = arguments_of(node)[:3]
    rank = len(lowering.shape(x))
    axes = [axis % rank for axis in (axes if axes else range(rank))]
    return _mean_over(lowering, node, axes, bool(keepdim))


def _mean_over(lowering: Lowering, node: fx.Node, axes: list[int], keepdim: bool) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    return lowering.emit(OPS.mean.default, pairs[0][0], axes, keepdim, qparams=output)


def _adaptive_avg_pool1d(lowering: Lowering, node: fx.Node) -> Value:
    x, (after,) = arguments_of(node)
    rank = len(lowering.shape(x))
    if after == 1:
        return _mean_over(lowering, node, [rank - 1], True)
    pool = adaptive_avg_pool2d((1, lowering.shape(x)[-1]), (1, after))
    return _pool_of_rows(lowering, node, pool)


def _adaptive_avg_pool2d(lowering: Lowering, node: fx.Node) -> Value:
    x, _ = arguments_of(node)
    before, after = lowering.shape(x), lowering.shape(node)[-2:]
    if after == (1, 1):
        return _mean_over(lowering, node, [len(before) - 2, len(before) - 1], True)
    return _pool(lowering, node, adaptive_avg_pool2d(before[-2:], after))


def _avg_pool1d(lowering: Lowering, node: fx.Node) -> Value:
    return _pool_of_rows(lowering, node, avg_pool1d(node))


def _avg_pool2d(lowering: Lowering, node: fx.Node) -> Value:
    return _pool(lowering, node, avg_pool2d(node))


def _pool(lowering: Lowering, node: fx.Node, pool: Pool) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    shape = lowering.shape(arguments_of(node)[0])
    return _pool_of_picture(lowering, node, pool, pairs[0], shape, output)


def _pool_of_rows(lowering: Lowering, node: fx.Node, pool: Pool) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.output_qparams(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    *outside, length = lowering.shape(arguments_of(node)[0])
    picture = as_picture(lowering, pairs[0][0]), pairs[0][1]
    shape = (*outside, 1, length)
    return as_rows(lowering, _pool_of_picture(lowering, node, pool, picture, shape, output))


def _pool_of_picture(
    lowering: Lowering,
    node: fx.Node,
    pool: Pool,
    picture: tuple[fx.Node, QParams],
    shape: tuple[int, ...],
    output: QParams,
) -> Value:
    source, qparams = picture
    if qparams.equal(output) and (pool.counts_padding or pool.is_same(shape[-2:])):
        options = (pool.kernel, pool.stride, pool.padding, pool.counts_padding)
        return lowering.emit(OPS.average_pool.default, source, *options, qparams=qparams)
    build = LoweringBuilder(lowering)
    return average_pool(build, Value(source, qparams), node.name, pool, shape, output)


def _bilinear(lowering: Lowering, node: fx.Node) -> Value:
    """Lower bilinear resizing: the kernel has the same qparams for input and output."""
    return same(lowering, node)


def _linear_resizing(lowering: Lowering, node: fx.Node) -> Value:
    aligned = bool(arguments_of(node)[2])
    return resized(lowering, node, _ATEN.upsample_bilinear2d.vec, aligned)


def _attention(lowering: Lowering, node: fx.Node) -> Value:
    """Lower attention in float: its inner tensors have no qparams."""
    query, key, value, mask, dropout, causal = arguments_of(node)
    if mask is not None or dropout or causal:
        raise CannotExpress("scaled_dot_product_attention with a mask or dropout has no form")
    scale = node.kwargs.get("scale") or lowering.shape(query)[-1] ** -0.5
    q, k, v = (lowering.real(x) for x in (query, key, value))
    scores = lowering.call(_ATEN.matmul.default, q, lowering.call(_ATEN.transpose.int, k, -2, -1))
    scaled = lowering.call(_ATEN.mul.Tensor, scores, scale)
    return Value(
        lowering.call(_ATEN.matmul.default, lowering.call(_ATEN.softmax.int, scaled, -1), v), None
    )


def _layer_norm(lowering: Lowering, node: fx.Node) -> Value:
    """Lower layer norm in float; the converter needs weight and bias even where there are none."""
    x, size, weight, bias, epsilon = arguments_of(node)[:5]
    scale = lowering.attribute(torch.ones(size)) if weight is None else lowering.real(weight)
    shift = lowering.attribute(torch.zeros(size)) if bias is None else lowering.real(bias)
    normalize = _ATEN.layer_norm.default
    return Value(
        lowering.call(normalize, lowering.real(x), size, scale, shift, epsilon, False), None
    )


def _batch_norm(lowering: Lowering, node: fx.Node) -> Value:
    """Lower a batch norm that could not be folded, in float."""
    x, weight, bias, mean, variance, momentum, epsilon = (lowering.real(x) for x in node.args)
    arguments = (x, weight, bias, mean, variance, False, momentum, epsilon, False)
    return Value(lowering.call(_ATEN.batch_norm.default, *arguments), None)


LOWER_FUNCTIONS: Mapping[Any, LowerFunction] = {
    _ATEN.conv2d.default: conv2d,
    _ATEN.conv2d.padding: conv2d_padding,
    _ATEN.conv1d.default: conv1d,
    _ATEN.conv_transpose1d.default: transposed,
    _ATEN.conv_transpose2d.input: transposed,
    _ATEN.linear.default: linear,
    _ATEN.add.Tensor: _binary,
    _ATEN.sub.Tensor: _binary,
    _ATEN.mul.Tensor: _binary,
    _ATEN.matmul.default: _binary,
    _ATEN.bmm.default: _binary,
    _ATEN.mm.default: _binary,
    _ATEN.mean.dim: _mean,
    _ATEN.adaptive_avg_pool1d.default: _adaptive_avg_pool1d,
    _ATEN.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    _ATEN.avg_pool1d.default: _avg_pool1d,
    _ATEN.avg_pool2d.default: _avg_pool2d,
    _ATEN.softmax.int: softmax,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.sigmoid.default: bounded("sigmoid", OF_SIGMOID),
    _ATEN.tanh.default: bounded("tanh", OF_TANH),
    _ATEN.hardswish.default: unary("hardswish"),
    _ATEN.gelu.default: gelu,
    _ATEN.elu.default: unary("elu"),
    _ATEN.leaky_relu.default: leaky_relu,
    _ATEN.prelu.default: prelu,
    _ATEN.silu.default: silu,
    _ATEN.hardsigmoid.default: hardsigmoid,
    _ATEN.rsub.Scalar: Lowering.as_float,
    _ATEN.div.Tensor: Lowering.as_float,
    _ATEN.reciprocal.default: Lowering.as_float,
    _ATEN.exp.default: Lowering.as_float,
    _ATEN.sqrt.default: Lowering.as_float,
    _ATEN.neg.default: Lowering.as_float,
    _ATEN.abs.default: Lowering.as_float,
    _ATEN.pow.Tensor_Scalar: Lowering.as_float,
    _ATEN.sum.dim_IntList: Lowering.as_float,
    _ATEN.mish.default: Lowering.as_float,
    _ATEN.layer_norm.default: _layer_norm,
    _ATEN.batch_norm.default: Lowering.as_float,
    _ATEN._native_batch_norm_legit_no_training.default: _batch_norm,
    _ATEN.upsample_linear1d.vec: _linear_resizing,
    _ATEN.upsample_bilinear2d.vec: _bilinear,
    **VALUE_PRESERVING,
}
"""Every operator that is lowered."""
