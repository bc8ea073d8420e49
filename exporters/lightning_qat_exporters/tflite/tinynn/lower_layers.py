"""Lower convolutions, transposed convolutions and linear layers to integer operators.

A layer with integer weights whose input or output is not quantized is refused, because its int8
kernel needs both scales. A layer with a float weight is computed in float.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.arithmetic import quantize_bias
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of, per_axis
from lightning_qat_exporters.tflite.decompose.conv_transpose import conv_transpose
from lightning_qat_exporters.tflite.tinynn.lower_clamps import fused_activation
from lightning_qat_exporters.tflite.tinynn.lower_rows import as_picture, as_rows
from lightning_qat_exporters.tflite.tinynn.lowering import Lowering, Value
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten


def conv2d(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.conv2d``."""
    x, weight_node, bias, *options, groups = arguments_of(node)
    weight = lowering.weight(weight_node)
    if weight is None:
        return lowering.as_float(node)
    stride, padding, dilation = (per_axis(value, 2) for value in options)
    source = _input_of_layer(lowering, x)
    options = [stride, padding, dilation, groups]
    return _layer(lowering, node, OPS.convolve.default, weight, bias, source, *options)


def conv2d_padding(lowering: Lowering, node: fx.Node) -> Value:
    """Lower a convolution with ``padding="same"`` or ``"valid"``.

    The larger half of an odd amount is added at the end, as torch does.
    """
    x, weight_node, bias, stride, mode, dilation, groups = arguments_of(node)
    weight = lowering.weight(weight_node)
    if weight is None:
        raise CannotExpress("a float convolution needs its padding in numbers")
    assert weight.integers is not None
    stride, dilation = per_axis(stride, 2), per_axis(dilation, 2)
    totals = [0, 0]
    if mode == "same":
        kernel = weight.integers.shape[2:]
        totals = [d * (size - 1) for d, size in zip(dilation, kernel, strict=True)]
    padding = [total // 2 for total in totals]
    source, qparams = _input_of_layer(lowering, x)
    if any(total % 2 for total in totals):
        extra = [0, totals[1] % 2, 0, totals[0] % 2]
        source = lowering.call(_ATEN.constant_pad_nd.default, source, extra)
    options = [stride, padding, dilation, groups]
    return _layer(lowering, node, OPS.convolve.default, weight, bias, (source, qparams), *options)


def conv1d(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.conv1d`` to a convolution of a picture of height 1."""
    x, weight_node, bias, *options, groups = arguments_of(node)
    weight = lowering.weight(weight_node)
    if weight is None:
        return lowering.as_float(node)
    stride, padding, dilation = (
        [start, *per_axis(v, 1)] for start, v in zip((1, 0, 1), options, strict=True)
    )
    source, qparams = _input_of_layer(lowering, x)
    picture = as_picture(lowering, source), qparams
    assert weight.integers is not None
    wide = replace(weight, integers=weight.integers.unsqueeze(2))
    options = [stride, padding, dilation, groups]
    value = _layer(lowering, node, OPS.convolve.default, wide, bias, picture, *options)
    return as_rows(lowering, value)


def transposed(lowering: Lowering, node: fx.Node) -> Value:
    """Lower transposed convolutions over one or two axes."""
    x, weight_node, bias = arguments_of(node)[:3]
    weight, output = lowering.weight(weight_node), lowering.output_qparams(node)
    if weight is None:
        return lowering.as_float(node)
    if output is None:
        raise lowering.not_quantized(node)
    plan = conv_transpose(node, _stored_integers(weight), weight.qparams, lowering.shape(x)[2:])
    source, qparams = _input_of_layer(lowering, x)
    if plan.one_dimensional:
        source = as_picture(lowering, source)
    value = lowering.emit_layer(
        OPS.transpose_convolve.default,
        source,
        lowering.attribute(plan.integers),
        lowering.attribute(plan.scale),
        _stored_bias(lowering, bias, qparams.scale, plan.scale),
        plan.stride,
        plan.size,
        qparams=output,
        key=weight.key,
    )
    for axis, start, end in plan.cuts:
        cut = lowering.call(_ATEN.slice.Tensor, value.node, 2 + axis, start, end)
        value = Value(cut, value.qparams)
    return as_rows(lowering, value) if plan.one_dimensional else value


def linear(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.linear``."""
    x, weight_node, bias = arguments_of(node)
    weight = lowering.weight(weight_node)
    if weight is None:
        return lowering.as_float(node)
    source = _input_of_layer(lowering, x)
    return _layer(lowering, node, OPS.linear.default, weight, bias, source)


def _input_of_layer(lowering: Lowering, argument: Any) -> tuple[fx.Node, QParams]:
    pairs = lowering.quantized(argument)
    if pairs is None:
        raise CannotExpress("its input is not quantized, its weight is")
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
    output = lowering.output_qparams(node)
    if output is None:
        raise lowering.not_quantized(node)
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
        raise CannotExpress(
            f"LiteRT's kernels take weights of 8 bits; got the grid {grid.qmin} .. {grid.qmax}",
            "Use WeightSpec(bits=8)",
        )
    return integers


def _stored_bias(
    lowering: Lowering, bias: Any, scale_input: Tensor, scale_weight: Tensor
) -> fx.Node | None:
    if bias is None:
        return None
    values = lowering.constant(bias)
    if values is None:
        raise CannotExpress("its bias is computed at run time")
    integers = quantize_bias(values, scale_input, scale_weight)
    limits = torch.iinfo(torch.int32)
    if int(integers.min()) < limits.min or int(integers.max()) > limits.max:
        raise CannotExpress(
            "its bias does not fit 32 bits at the scale of input times weight",
            "Look for a channel whose weights are almost zero",
        )
    return lowering.attribute(integers.to(torch.int32))
