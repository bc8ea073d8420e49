"""Which operator becomes what: a table from torch's operators to functions, one per operator.

A form takes the integer road when its inputs are integers and its output is put on a grid. Joins
and activations without one are computed in float, as torch does; a layer with integer weights is
refused, because its kernel cannot do without the grid of its output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose import average_pool as averages
from lightning_qat_exporters.tflite.decompose import hardsigmoid as sigmoids
from lightning_qat_exporters.tflite.decompose.conv_transpose import dense, dense_scale, size_and_cut
from lightning_qat_exporters.tflite.tinynn.lower_value_preserving import PASSING, fused_activation
from lightning_qat_exporters.tflite.tinynn.lowering import (
    INT8,
    LITERT,
    Form,
    Lowering,
    Refused,
    Value,
    arguments_of,
)
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten


def _int8(scale: float, zero_point: int) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), INT8)


# The grids that TFLite's specification demands of these kernels' results.
_OF_SIGMOID = _int8(1 / 256, -128)
_OF_SOFTMAX = _int8(1 / 256, -128)
_OF_TANH = _int8(1 / 128, 0)


_NO_OUTPUT = (
    "an int8 kernel needs the scale of its output, which is not quantized",
    f"Prepare with Recipe(joins=True, outputs=True). {LITERT}",
)


# Layers


def _conv2d(lowering: Lowering, node: fx.Node) -> Value:
    args = arguments_of(node, None, None, None, (1, 1), (0, 0), (1, 1), 1)
    weight = lowering.weight(args[1])
    if weight is None:
        return lowering.as_float(node)
    stride, padding, dilation = (_pair(value) for value in args[3:6])
    source = _input_of_layer(lowering, args[0])
    return _layer(
        lowering, node, OPS.convolve.default, weight, args[2], source, stride, padding, dilation,
        args[6],
    )  # fmt: skip


def _conv2d_padding(lowering: Lowering, node: fx.Node) -> Value:
    """``padding="same"`` or ``"valid"``; the larger half goes behind, as torch does."""
    args = arguments_of(node, None, None, None, (1, 1), "valid", (1, 1), 1)
    weight = lowering.weight(args[1])
    if weight is None:
        raise Refused("a float convolution needs its padding in numbers", LITERT)
    assert weight.integers is not None
    stride, dilation = _pair(args[3]), _pair(args[5])
    totals = [0, 0]
    if args[4] == "same":
        kernel = weight.integers.shape[2:]
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
    padding = [total // 2 for total in totals]
    source, qparams = _input_of_layer(lowering, args[0])
    if any(total % 2 for total in totals):
        extra = [0, totals[1] % 2, 0, totals[0] % 2]
        source = lowering.call(_ATEN.constant_pad_nd.default, source, extra)
    return _layer(
        lowering, node, OPS.convolve.default, weight, args[2], (source, qparams), stride, padding,
        dilation, args[6],
    )  # fmt: skip


def _conv1d(lowering: Lowering, node: fx.Node) -> Value:
    """On a picture of height 1."""
    args = arguments_of(node, None, None, None, 1, 0, 1, 1)
    weight = lowering.weight(args[1])
    if weight is None:
        return lowering.as_float(node)
    stride, padding, dilation = (
        [start, *_list(v)] for start, v in zip((1, 0, 1), args[3:6], strict=True)
    )
    source, qparams = _input_of_layer(lowering, args[0])
    picture = lowering.call(_ATEN.unsqueeze.default, source, 2)
    return _flat(lowering, _layer(
        lowering, node, OPS.convolve.default, _widened(weight), args[2], (picture, qparams), stride,
        padding, dilation, args[6],
    ))  # fmt: skip


def _flat(lowering: Lowering, value: Value) -> Value:
    """Rows of a picture of height 1."""
    return Value(lowering.call(_ATEN.squeeze.dim, value.node, 2), value.qparams)


def _widened(weight: QuantizedTensor) -> QuantizedTensor:
    """A kernel of one dimension as one of two."""
    assert weight.integers is not None
    return replace(weight, integers=weight.integers.unsqueeze(2))


def _conv_transpose(lowering: Lowering, node: fx.Node) -> Value:
    """Without padding, then cut: the kernel's own padding is another than torch's."""
    x, weight_node, bias, *options = arguments_of(node, None, None, None, 1, 0, 0, 1, 1)
    weight = lowering.weight(weight_node)
    if weight is None:
        return lowering.as_float(node)
    assert weight.integers is not None
    output, groups = lowering.grid_behind(node), options.pop(3)
    if output is None:
        raise Refused(*_NO_OUTPUT)
    axes = weight.integers.dim() - 2
    stride, padding, extra, dilation = (
        _list(value) * (axes // len(_list(value))) for value in options
    )
    integers = dense(_stored_integers(weight), groups, dilation)
    whole, starts, ends = size_and_cut(
        lowering.shape(x)[2:], integers.shape[2:], stride, padding, extra
    )
    source, qparams = _input_of_layer(lowering, x)
    if axes == 1:
        source, integers = lowering.call(_ATEN.unsqueeze.default, source, 2), integers.unsqueeze(2)
        stride, whole, starts, ends = [1, *stride], [1, *whole], [0, *starts], [1, *ends]
    scale = dense_scale(weight.qparams, groups)
    value = lowering.emit_layer(
        OPS.transpose_convolve.default,
        source,
        lowering.attribute(integers),
        lowering.attribute(scale),
        _stored_bias(lowering, bias, qparams.scale, scale),
        stride,
        whole,
        qparams=output,
        key=weight.key,
    )
    for axis, n, start, end in zip((2, 3), whole, starts, ends, strict=True):
        if (start, end) != (0, n):
            cut = lowering.call(_ATEN.slice.Tensor, value.node, axis, start, end)
            value = Value(cut, value.qparams)
    return _flat(lowering, value) if axes == 1 else value


def _linear(lowering: Lowering, node: fx.Node) -> Value:
    x, weight_node, bias = arguments_of(node, None, None, None)
    weight = lowering.weight(weight_node)
    if weight is None:
        return lowering.as_float(node)
    source = _input_of_layer(lowering, x)
    return _layer(lowering, node, OPS.linear.default, weight, bias, source)


def _input_of_layer(lowering: Lowering, argument: Any) -> tuple[fx.Node, QParams]:
    pairs = lowering.quantized(argument)
    if pairs is None:
        raise Refused("its input is not quantized, its weight is", LITERT)
    return pairs[0]


def _layer(
    lowering: Lowering,
    node: fx.Node,
    target: Any,
    weight: QuantizedTensor,
    bias: Any,
    source: tuple[fx.Node, QParams],
    *options: Any,
) -> Value:
    output = lowering.grid_behind(node)
    if output is None:
        raise Refused(*_NO_OUTPUT)
    activation = fused_activation(lowering, node)
    x, qparams = source
    constants = (
        lowering.attribute(_stored_integers(weight)),
        lowering.attribute(weight.qparams.scale),
        _stored_bias(lowering, bias, qparams.scale, weight.qparams.scale),
    )
    return lowering.emit_layer(
        target, x, *constants, *options, activation, qparams=output, key=weight.key
    )


def _stored_integers(weight: QuantizedTensor) -> Tensor:
    grid, integers = weight.qparams.grid, weight.integers
    if integers is None or grid.dtype is not torch.int8:
        raise Refused(
            f"LiteRT's kernels take weights of 8 bits; got the grid {grid.qmin} .. {grid.qmax}",
            "Use WeightSpec(bits=8)",
        )
    return integers


def _stored_bias(
    lowering: Lowering, bias: Any, scale_input: Tensor, scale_weight: Tensor
) -> fx.Node | None:
    if bias is None:
        return None
    if bias not in lowering.constants:
        raise Refused("its bias is computed at run time", LITERT)
    integers = quantize_bias(lowering.constants[bias], scale_input, scale_weight)
    limits = torch.iinfo(torch.int32)
    if int(integers.min()) < limits.min or int(integers.max()) > limits.max:
        raise Refused(
            "its bias does not fit 32 bits at the scale of input times weight",
            "Look for a channel whose weights are almost zero",
        )
    return lowering.attribute(integers.to(torch.int32))


# Joins


def _binary(lowering: Lowering, node: fx.Node) -> Value:
    pairs, output = lowering.quantized(*node.args[:2]), lowering.grid_behind(node)
    # `alpha`, which scales the second operand, is a keyword.
    if pairs is None or output is None or node.kwargs.get("alpha", 1) != 1:
        return lowering.as_float(node)
    name = str(node.target).removeprefix("aten.").split(".")[0]
    function = "matmul" if name in ("matmul", "bmm", "mm") else name
    activation = "none" if function == "matmul" else fused_activation(lowering, node)
    nodes = [pair[0] for pair in pairs]
    return lowering.emit(OPS.binary.default, *nodes, function, activation, qparams=output)


def _mean(lowering: Lowering, node: fx.Node) -> Value:
    x, axes, keepdim = arguments_of(node, None, None, False)
    rank = len(lowering.shape(x))
    axes = [axis % rank for axis in (axes if axes else range(rank))]
    return _mean_over(lowering, node, axes, bool(keepdim))


def _mean_over(lowering: Lowering, node: fx.Node, axes: list[int], keepdim: bool) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    return lowering.emit(OPS.mean.default, pairs[0][0], axes, keepdim, qparams=output)


def _adaptive_avg_pool2d(lowering: Lowering, node: fx.Node) -> Value:
    x, size = node.args
    shape = lowering.shape(_node(x))
    if _pair(size) == [1, 1]:
        return _mean_over(lowering, node, [len(shape) - 2, len(shape) - 1], True)
    kernel = [before // after for before, after in zip(shape[-2:], _pair(size), strict=True)]
    if [k * after for k, after in zip(kernel, _pair(size), strict=True)] != list(shape[-2:]):
        raise Refused(f"windows of unequal size: {tuple(shape[-2:])} to {size}", LITERT)
    return _pool(lowering, node, kernel, kernel, [0, 0], True)


def _avg_pool2d(lowering: Lowering, node: fx.Node) -> Value:
    _, kernel, stride, padding, ceil, counts, divisor = arguments_of(
        node, None, None, [], 0, False, True, None
    )
    if ceil or divisor is not None:
        raise Refused("avg_pool2d with ceil_mode or divisor_override has no form", LITERT)
    kernel = _pair(kernel)
    return _pool(lowering, node, kernel, _pair(stride) or kernel, _pair(padding), bool(counts))


def _pool(
    lowering: Lowering,
    node: fx.Node,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    counts: bool,
) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    source, qparams = pairs[0]
    shape = lowering.shape(_node(node.args[0]))
    counts = counts or not any(padding)
    kernel_has_form = counts or averages.is_same(shape[-2:], kernel, stride, padding)
    if qparams.equal(output) and kernel_has_form:
        return lowering.emit(
            OPS.average_pool.default, source, kernel, stride, padding, counts, qparams=qparams
        )
    weight = averages.equal_weights(f"{node.name}.weight", shape[-3], kernel)
    mean = lowering.emit_layer(
        OPS.convolve.default,
        source,
        lowering.attribute(_stored_integers(weight)),
        lowering.attribute(weight.qparams.scale),
        None,
        stride,
        padding,
        [1, 1],
        shape[-3],
        "none",
        qparams=output,
        key=weight.key,
    )
    if counts:
        return mean
    factors = averages.border_factors(f"{node.name}.border", shape[-2:], kernel, stride, padding)
    constant = lowering.integers(factors)
    return lowering.emit(OPS.binary.default, mean.node, constant, "mul", "none", qparams=output)


def _bilinear(lowering: Lowering, node: fx.Node) -> Value:
    """On the grid of its input, as the kernel wants it."""
    return PASSING[_ATEN.upsample_nearest2d.vec](lowering, node)


def _softmax(lowering: Lowering, node: fx.Node) -> Value:
    pairs = lowering.quantized(node.args[0])
    if pairs is None or lowering.grid_behind(node) is None:
        return lowering.as_float(node)
    axis = arguments_of(
        node,
    )[1] % len(lowering.shape(_node(node.args[0])))
    return lowering.emit(OPS.softmax.default, pairs[0][0], axis, qparams=_OF_SOFTMAX)


def _attention(lowering: Lowering, node: fx.Node) -> Value:
    """In float: what is inside of it has no grids."""
    query, key, value, mask, dropout, causal = arguments_of(
        node, None, None, None, None, 0.0, False
    )
    if mask is not None or dropout or causal:
        raise Refused("scaled_dot_product_attention with a mask or dropout has no form", LITERT)
    scale = node.kwargs.get("scale") or lowering.shape(query)[-1] ** -0.5
    q, k, v = (lowering.real(x) for x in (query, key, value))
    scores = lowering.call(_ATEN.matmul.default, q, lowering.call(_ATEN.transpose.int, k, -2, -1))
    scaled = lowering.call(_ATEN.mul.Tensor, scores, scale)
    return Value(
        lowering.call(_ATEN.matmul.default, lowering.call(_ATEN.softmax.int, scaled, -1), v), None
    )


def _layer_norm(lowering: Lowering, node: fx.Node) -> Value:
    """In float; the converter wants weight and bias even where they change nothing."""
    x, size, weight, bias, epsilon = arguments_of(node, None, None, None, None, 1e-5)[:5]
    scale = lowering.attribute(torch.ones(size)) if weight is None else lowering.real(weight)
    shift = lowering.attribute(torch.zeros(size)) if bias is None else lowering.real(bias)
    normalize = _ATEN.layer_norm.default
    return Value(
        lowering.call(normalize, lowering.real(x), size, scale, shift, epsilon, False), None
    )


def _batch_norm(lowering: Lowering, node: fx.Node) -> Value:
    """In float: what could be folded has been."""
    x, weight, bias, mean, variance, momentum, epsilon = (lowering.real(x) for x in node.args)
    arguments = (x, weight, bias, mean, variance, False, momentum, epsilon, False)
    return Value(lowering.call(_ATEN.batch_norm.default, *arguments), None)


# Activations


def _unary(function: str) -> Form:
    def form(lowering: Lowering, node: fx.Node) -> Value:
        pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
        if pairs is None or output is None:
            return lowering.as_float(node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=output)

    return form


def _bounded(function: str, qparams: QParams) -> Form:
    """A function whose kernel has a fixed grid."""

    def form(lowering: Lowering, node: fx.Node) -> Value:
        pairs = lowering.quantized(node.args[0])
        if pairs is None or lowering.grid_behind(node) is None:
            return lowering.as_float(node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=qparams)

    return form


def _gelu(lowering: Lowering, node: fx.Node) -> Value:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return _unary("gelu_tanh" if tanh else "gelu")(lowering, node)


def _leaky_relu(lowering: Lowering, node: fx.Node) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    slope = float(arguments_of(node, None, 0.01)[1])
    return lowering.emit(OPS.leaky_relu.default, pairs[0][0], slope, qparams=output)


def _silu(lowering: Lowering, node: fx.Node) -> Value:
    """``x * sigmoid(x)``: TFLite has no kernel of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    x = pairs[0][0]
    gate = lowering.emit(OPS.unary.default, x, "sigmoid", qparams=_OF_SIGMOID)
    return lowering.emit(OPS.binary.default, x, gate.node, "mul", "none", qparams=output)


def _hardsigmoid(lowering: Lowering, node: fx.Node) -> Value:
    """``relu6(x + 3) / 6``: TFLite has no kernel of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return lowering.as_float(node)
    three = lowering.integers(sigmoids.three(f"{node.name}.three"))
    sixth = lowering.integers(sigmoids.sixth(f"{node.name}.sixth"))
    coarse = _int8(float(output.scale) * sigmoids.TIMES, int(output.zero_point))
    moved = lowering.emit(OPS.binary.default, pairs[0][0], three, "add", "relu6", qparams=coarse)
    return lowering.emit(OPS.binary.default, moved.node, sixth, "mul", "none", qparams=output)


def _list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _pair(value: Any) -> list[int]:
    values = _list(value)
    return values * 2 if len(values) == 1 else values


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


FORMS: Mapping[Any, Form] = {
    _ATEN.conv2d.default: _conv2d,
    _ATEN.conv2d.padding: _conv2d_padding,
    _ATEN.conv1d.default: _conv1d,
    _ATEN.conv_transpose1d.default: _conv_transpose,
    _ATEN.conv_transpose2d.input: _conv_transpose,
    _ATEN.linear.default: _linear,
    _ATEN.add.Tensor: _binary,
    _ATEN.sub.Tensor: _binary,
    _ATEN.mul.Tensor: _binary,
    _ATEN.matmul.default: _binary,
    _ATEN.bmm.default: _binary,
    _ATEN.mm.default: _binary,
    _ATEN.mean.dim: _mean,
    _ATEN.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    _ATEN.avg_pool2d.default: _avg_pool2d,
    _ATEN.softmax.int: _softmax,
    _ATEN.scaled_dot_product_attention.default: _attention,
    _ATEN.sigmoid.default: _bounded("sigmoid", _OF_SIGMOID),
    _ATEN.tanh.default: _bounded("tanh", _OF_TANH),
    _ATEN.hardswish.default: _unary("hardswish"),
    _ATEN.gelu.default: _gelu,
    _ATEN.elu.default: _unary("elu"),
    _ATEN.leaky_relu.default: _leaky_relu,
    _ATEN.silu.default: _silu,
    _ATEN.hardsigmoid.default: _hardsigmoid,
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
    _ATEN.upsample_bilinear2d.vec: _bilinear,
    **PASSING,
}
"""Every operator that has a form."""
