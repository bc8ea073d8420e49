"""Which operator becomes what: a table from torch's operators to functions, one per operator.

A form takes the integer road when its inputs are integers and its output is put on a grid. Joins
and activations without one are computed in float, as torch does; a layer with integer weights is
refused, because its kernel cannot do without the grid of its output.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lightning_qat.arithmetic import quantize_bias
from lightning_qat.qparams import QParams
from lightning_qat.quantized_model import QuantizedTensor
from lightning_qat_exporters._tinynn_lowering import INT8, LITERT, Form, Lowering, Refused, Value
from lightning_qat_exporters._tinynn_ops import OPS

_ATEN = torch.ops.aten

_FUSABLE = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}


def _int8(scale: float, zero_point: int) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), INT8)


# The grids that TFLite's specification demands of these kernels' results.
_OF_SIGMOID = _int8(1 / 256, -128)
_OF_SOFTMAX = _int8(1 / 256, -128)
_OF_TANH = _int8(1 / 128, 0)


# Layers


def _conv2d(lowering: Lowering, node: fx.Node) -> Value:
    args = _arguments(node, (None, None, None, (1, 1), (0, 0), (1, 1), 1))
    weight = lowering.weight(args[1])
    if weight is None:
        return _float(lowering, node)
    stride, padding, dilation = (_pair(value) for value in args[3:6])
    source = _input_of_layer(lowering, args[0])
    return _layer(
        lowering, node, OPS.convolve.default, weight, args[2], source, stride, padding, dilation,
        args[6],
    )  # fmt: skip


def _conv2d_padding(lowering: Lowering, node: fx.Node) -> Value:
    """``padding="same"`` or ``"valid"``; the larger half goes behind, as torch does."""
    args = _arguments(node, (None, None, None, (1, 1), "valid", (1, 1), 1))
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


def _linear(lowering: Lowering, node: fx.Node) -> Value:
    x, weight_node, bias = _arguments(node, (None, None, None))
    weight = lowering.weight(weight_node)
    if weight is None:
        return _float(lowering, node)
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
        raise Refused(
            "an int8 kernel needs the scale of its output, which is not quantized",
            f"Prepare with Recipe(joins=True, outputs=True). {LITERT}",
        )
    activation = _fused_activation(lowering, node)
    x, qparams = source
    constants = (
        lowering.attribute(_stored_integers(weight)),
        lowering.attribute(weight.qparams.scale),
        _stored_bias(lowering, bias, qparams.scale, weight),
    )
    scale, zero_point = float(output.scale), int(output.zero_point) + 128
    result = lowering.call(
        target, x, *constants, *options, activation, scale, zero_point, weight.key
    )
    return Value(result, output)


def _stored_integers(weight: QuantizedTensor) -> Tensor:
    grid, integers = weight.qparams.grid, weight.integers
    if integers is None or grid.dtype is not torch.int8 or int(integers.min()) < -127:
        raise Refused(
            f"LiteRT's kernels take weights of -127 .. 127; got the grid {grid.qmin} .. "
            f"{grid.qmax}",
            "Use WeightSpec(bits=8)",
        )
    return integers


def _stored_bias(
    lowering: Lowering, bias: Any, scale_input: Tensor, weight: QuantizedTensor
) -> fx.Node | None:
    if bias is None:
        return None
    integers = quantize_bias(lowering.constants[bias], scale_input, weight.qparams.scale)
    limits = torch.iinfo(torch.int32)
    if int(integers.min()) < limits.min or int(integers.max()) > limits.max:
        raise Refused(
            "its bias does not fit 32 bits at the scale of input times weight",
            "Look for a channel whose weights are almost zero",
        )
    return lowering.attribute(integers.to(torch.int32))


def _fused_activation(lowering: Lowering, node: fx.Node) -> str:
    """The name of the clamp that alone reads a result; it is part of the kernel then."""
    reader = lowering.only_reader(node)
    name = _FUSABLE.get(_clamp_range(reader) or (1.0, 0.0)) if reader is not None else None
    if reader is None or name is None:
        return "none"
    lowering.fused.add(reader)
    return name


# Clamps


def _clamp_range(node: fx.Node) -> tuple[float, float] | None:
    """The range that an operator clamps to; ``None`` for any other operator."""
    if node.target is _ATEN.relu.default:
        return 0.0, math.inf
    if node.target is _ATEN.relu6.default:
        return 0.0, 6.0
    if node.target is _ATEN.clamp_min.default:
        return float(_arguments(node, ())[1]), math.inf
    if node.target in (_ATEN.hardtanh.default, _ATEN.clamp.default):
        defaults = (-1.0, 1.0) if node.target is _ATEN.hardtanh.default else (None, None)
        _, low, high = _arguments(node, (None, *defaults))
        return (
            -math.inf if low is None else float(low),
            math.inf if high is None else float(high),
        )
    return None


def _clamp(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.value(node.args[0])
    assert value is not None
    if node in lowering.fused:
        return value
    qparams = value.qparams
    if qparams is None:
        return _float(lowering, node)
    bounds = _clamp_range(node)
    assert bounds is not None
    low, high = ((x - qparams.zero_point) * qparams.scale for x in (INT8.qmin, INT8.qmax))
    if bounds[0] <= low and high <= bounds[1]:
        return value
    if bounds in _FUSABLE:
        return lowering.emit(OPS.unary.default, value.node, _FUSABLE[bounds], qparams=qparams)
    for name, bound in zip(("maximum", "minimum"), bounds, strict=True):
        if math.isfinite(bound):
            limit = lowering.constant(torch.tensor([bound]), qparams)
            value = lowering.emit(
                OPS.binary.default, value.node, limit, name, "none", qparams=qparams
            )
    return value


# Joins


def _binary(lowering: Lowering, node: fx.Node) -> Value:
    pairs, output = lowering.quantized(*node.args[:2]), lowering.grid_behind(node)
    # `alpha`, which scales the second operand, is a keyword.
    if pairs is None or output is None or node.kwargs.get("alpha", 1) != 1:
        return _float(lowering, node)
    name = str(node.target).removeprefix("aten.").split(".")[0]
    function = "matmul" if name in ("matmul", "bmm", "mm") else name
    activation = "none" if function == "matmul" else _fused_activation(lowering, node)
    nodes = [pair[0] for pair in pairs]
    return lowering.emit(OPS.binary.default, *nodes, function, activation, qparams=output)


def _cat(lowering: Lowering, node: fx.Node) -> Value:
    items, axis = _arguments(node, (None, 0))
    pairs = lowering.quantized(*items)
    output = lowering.grid_behind(node) if pairs is None else pairs[0][1]
    if output is None:
        return Value(
            lowering.call(_ATEN.cat.default, [lowering.real(i) for i in items], axis), None
        )
    if pairs is not None and not all(qparams.equal(output) for _, qparams in pairs):
        # CONCATENATION has one grid for all its inputs and its output.
        output = lowering.grid_behind(node) or max((p[1] for p in pairs), key=lambda q: q.scale)
    values = (lowering.value(item) for item in items)
    moved = [lowering.on_grid(value, output).node for value in values if value is not None]
    return Value(lowering.call(_ATEN.cat.default, moved, axis), output)


def _stack(lowering: Lowering, node: fx.Node) -> Value:
    raise Refused("stack is not lowered yet", LITERT)


def _mean(lowering: Lowering, node: fx.Node) -> Value:
    x, axes, keepdim = _arguments(node, (None, None, False))
    rank = len(lowering.shape(x))
    axes = [axis % rank for axis in (axes if axes else range(rank))]
    return _mean_over(lowering, node, axes, bool(keepdim))


def _mean_over(lowering: Lowering, node: fx.Node, axes: list[int], keepdim: bool) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return _float(lowering, node)
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
    _, kernel, stride, padding, ceil, counts, divisor = _arguments(
        node, (None, None, [], 0, False, True, None)
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
    size = lowering.shape(_node(node.args[0]))[-2:]
    counted = counts or not any(padding)
    if pairs is None or output is None or not (counted or _is_same(size, kernel, stride, padding)):
        return _float(lowering, node)
    source, qparams = pairs[0]
    return lowering.emit(
        OPS.average_pool.default, source, kernel, stride, padding, counts, qparams=qparams
    )


def _is_same(
    size: tuple[int, ...], kernel: list[int], stride: list[int], padding: list[int]
) -> bool:
    """Whether TFLite's padding SAME is this padding on both sides."""
    return all(
        max((math.ceil(n / s) - 1) * s + k - n, 0) == 2 * p and (n + 2 * p - k) % s == 0
        for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
    )


def _softmax(lowering: Lowering, node: fx.Node) -> Value:
    pairs = lowering.quantized(node.args[0])
    if pairs is None or lowering.grid_behind(node) is None:
        return _float(lowering, node)
    axis = _arguments(node, ())[1] % len(lowering.shape(_node(node.args[0])))
    return lowering.emit(OPS.softmax.default, pairs[0][0], axis, qparams=_OF_SOFTMAX)


def _attention(lowering: Lowering, node: fx.Node) -> Value:
    """In float: what is inside of it has no grids."""
    query, key, value, mask, dropout, causal = _arguments(
        node, (None, None, None, None, 0.0, False)
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


# Activations


def _unary(function: str) -> Form:
    def form(lowering: Lowering, node: fx.Node) -> Value:
        pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
        if pairs is None or output is None:
            return _float(lowering, node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=output)

    return form


def _bounded(function: str, qparams: QParams) -> Form:
    """A function whose kernel has a fixed grid."""

    def form(lowering: Lowering, node: fx.Node) -> Value:
        pairs = lowering.quantized(node.args[0])
        if pairs is None or lowering.grid_behind(node) is None:
            return _float(lowering, node)
        return lowering.emit(OPS.unary.default, pairs[0][0], function, qparams=qparams)

    return form


def _gelu(lowering: Lowering, node: fx.Node) -> Value:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return _unary("gelu_tanh" if tanh else "gelu")(lowering, node)


def _leaky_relu(lowering: Lowering, node: fx.Node) -> Value:
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return _float(lowering, node)
    slope = float(_arguments(node, (None, 0.01))[1])
    return lowering.emit(OPS.leaky_relu.default, pairs[0][0], slope, qparams=output)


def _silu(lowering: Lowering, node: fx.Node) -> Value:
    """``x * sigmoid(x)``: TFLite has no kernel of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return _float(lowering, node)
    x = pairs[0][0]
    gate = lowering.emit(OPS.unary.default, x, "sigmoid", qparams=_OF_SIGMOID)
    return lowering.emit(OPS.binary.default, x, gate.node, "mul", "none", qparams=output)


def _hardsigmoid(lowering: Lowering, node: fx.Node) -> Value:
    """``relu6(x + 3) / 6``: TFLite has no kernel of its own."""
    pairs, output = lowering.quantized(node.args[0]), lowering.grid_behind(node)
    if pairs is None or output is None:
        return _float(lowering, node)
    three = lowering.constant(torch.tensor([3.0]), _int8(3 / 127, 0))
    sixth = lowering.constant(torch.tensor([1 / 6]), _int8(1 / 6 / 127, 0))
    moved = lowering.emit(
        OPS.binary.default, pairs[0][0], three, "add", "relu6", qparams=_int8(6 / 255, -128)
    )
    return lowering.emit(OPS.binary.default, moved.node, sixth, "mul", "none", qparams=output)


# Operators that hand values on


def _same_grid(lowering: Lowering, node: fx.Node) -> Value:
    """The same operator on integers: its result lies on the grid of its first argument."""
    value = lowering.value(node.args[0])
    assert value is not None
    target: Any = _ATEN.reshape.default if node.target is _ATEN.view.default else node.target
    kwargs = {name: lowering.concrete(argument) for name, argument in node.kwargs.items()}
    args = tuple(lowering.concrete(argument) for argument in node.args)
    return Value(lowering.graph.call_function(target, args, kwargs), value.qparams)


def _identity(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.value(node.args[0])
    assert value is not None
    return value


def _copy(lowering: Lowering, node: fx.Node) -> Value:
    """What an in-place operator has become: the second argument is the new value."""
    value = lowering.value(node.args[1])
    assert value is not None
    return value


def _pad(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.value(node.args[0])
    if value is not None and value.qparams is not None:
        fill = _arguments(node, (None, None, 0))[2]
        if fill not in (0, 0.0):
            raise Refused(f"padding with {fill} instead of 0 would need a new grid", LITERT)
    return _same_grid(lowering, node)


# Float


def _float(lowering: Lowering, node: fx.Node) -> Value:
    """The same operator in float, on real inputs."""
    args = tuple(lowering.real(argument) for argument in node.args)
    kwargs = {name: lowering.real(argument) for name, argument in node.kwargs.items()}
    target: Any = node.target
    return Value(lowering.graph.call_function(target, args, kwargs), None)


def _arguments(node: fx.Node, defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    given: tuple[Any, ...] = node.args
    return (*given, *defaults[len(given) :])


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument


FORMS: Mapping[Any, Form] = {
    _ATEN.conv2d.default: _conv2d,
    _ATEN.conv2d.padding: _conv2d_padding,
    _ATEN.linear.default: _linear,
    _ATEN.relu.default: _clamp,
    _ATEN.relu6.default: _clamp,
    _ATEN.hardtanh.default: _clamp,
    _ATEN.clamp.default: _clamp,
    _ATEN.clamp_min.default: _clamp,
    _ATEN.add.Tensor: _binary,
    _ATEN.sub.Tensor: _binary,
    _ATEN.mul.Tensor: _binary,
    _ATEN.matmul.default: _binary,
    _ATEN.bmm.default: _binary,
    _ATEN.mm.default: _binary,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
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
    _ATEN.mish.default: _float,
    _ATEN.layer_norm.default: _float,
    _ATEN.batch_norm.default: _float,
    _ATEN.upsample_bilinear2d.vec: _same_grid,
    _ATEN.max_pool2d.default: _same_grid,
    _ATEN.upsample_nearest2d.vec: _same_grid,
    _ATEN.view.default: _same_grid,
    _ATEN.reshape.default: _same_grid,
    _ATEN.permute.default: _same_grid,
    _ATEN.transpose.int: _same_grid,
    _ATEN.unsqueeze.default: _same_grid,
    _ATEN.squeeze.dim: _same_grid,
    _ATEN.slice.Tensor: _same_grid,
    _ATEN.select.int: _same_grid,
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.clone.default: _identity,
    _ATEN.copy.default: _copy,
    operator.getitem: _same_grid,
}
"""Every operator that has a form."""

PASSING = frozenset(
    target
    for target, form in FORMS.items()
    if form in (_same_grid, _identity, _copy, _pad, _clamp, _cat)
) - {_ATEN.upsample_bilinear2d.vec}
"""Operators that only hand values on, so that a grid behind them can be put in front of them."""
