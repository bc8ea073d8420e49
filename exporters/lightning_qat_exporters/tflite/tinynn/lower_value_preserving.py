"""Lower value-preserving operators, which move, select or clamp values.

Their output has the qparams of their input, so the same operator on integers is exact.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.operators import CLAMPS
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.tinynn.lowering import (
    INT8,
    LowerFunction,
    Lowering,
    Value,
)
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten

_FUSABLE = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}


# Clamps


def fused_activation(lowering: Lowering, node: fx.Node) -> str:
    """The name of the clamp that alone reads a result; it becomes part of the kernel."""
    reader = lowering.only_reader(node)
    bounds = None if reader is None else _clamp_range(reader)
    if reader is None or bounds not in _FUSABLE:
        return "none"
    lowering.fused.add(reader)
    return _FUSABLE[bounds]


def _clamp_range(node: fx.Node) -> tuple[float, float] | None:
    """The range that an operator clamps to; ``None`` for any other operator."""
    target: Any = node.target
    arguments = arguments_of(node)
    if target is _ATEN.clamp_min.default:
        return float(arguments[1]), math.inf
    # Only overloads whose ends are numbers: `aten.clamp.default`, not `aten.clamp.Tensor`.
    clamp = CLAMPS.get(str(target).removeprefix("aten.").removesuffix(".default"))
    if clamp is None:
        return None
    low, high = arguments[1:3] if clamp.arguments else (clamp.low, clamp.high)
    return (
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


def _clamp(lowering: Lowering, node: fx.Node) -> Value:
    value, bounds = lowering.value(node.args[0]), _clamp_range(node)
    assert value is not None
    assert bounds is not None
    qparams = value.qparams
    if node in lowering.fused:
        return value
    if qparams is None:
        return lowering.as_float(node)
    inside = (
        _nearest(bounds[0], qparams) > INT8.qmin,
        _nearest(bounds[1], qparams) < INT8.qmax,
    )
    if any(inside) and bounds in _FUSABLE:
        return lowering.emit(OPS.unary.default, value.node, _FUSABLE[bounds], qparams=qparams)
    for name, bound, cuts in zip(("maximum", "minimum"), bounds, inside, strict=True):
        if cuts:
            limit = lowering.constant(torch.tensor([bound]), qparams)
            value = lowering.emit(
                OPS.binary.default, value.node, limit, name, "none", qparams=qparams
            )
    return value


def _nearest(bound: float, qparams: QParams) -> float:
    """The integer next to a real bound, also outside the range of integers."""
    steps = bound / float(qparams.scale)
    return (round(steps) if math.isfinite(steps) else steps) + int(qparams.zero_point)


# Moves and selections


def _same(lowering: Lowering, node: fx.Node) -> Value:
    """The same operator, on integers where they are."""
    return _moved(lowering, node, node.target)


def _moved(lowering: Lowering, node: fx.Node, target: Any, *options: Any) -> Value:
    """An operator on the first argument, with the node's own options or others."""
    value = _given(lowering, node)
    args = options or tuple(lowering.concrete(argument) for argument in node.args[1:])
    kwargs = {} if options else {k: lowering.concrete(v) for k, v in node.kwargs.items()}
    return Value(lowering.graph.call_function(target, (value.node, *args), kwargs), value.qparams)


def _given(lowering: Lowering, node: fx.Node) -> Value:
    value = lowering.value(node.args[0])
    assert value is not None
    return value


def _reshape(lowering: Lowering, node: fx.Node) -> Value:
    return _moved(lowering, node, _ATEN.reshape.default, lowering.concrete(node.args[1]))


def _t(lowering: Lowering, node: fx.Node) -> Value:
    if len(lowering.shape(node)) < 2:
        return _given(lowering, node)
    return _moved(lowering, node, _ATEN.transpose.int, -2, -1)


def _tile(lowering: Lowering, node: fx.Node) -> Value:
    times = list(arguments_of(node)[1])
    missing = len(lowering.shape(node)) - len(times)
    return _moved(lowering, node, _ATEN.repeat.default, [1] * missing + times)


def _adaptive_max_pool2d(lowering: Lowering, node: fx.Node) -> Value:
    """Windows of one size; the places of the largest values are not given."""
    source, after = arguments_of(node)
    before = lowering.shape(source)[-2:]
    kernel = [b // a for b, a in zip(before, after, strict=True)]
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise CannotExpress(f"windows of unequal size: {tuple(before)} to {tuple(after)}")
    return _moved(lowering, node, _ATEN.max_pool2d.default, kernel, kernel)


def _roll(lowering: Lowering, node: fx.Node) -> Value:
    _, shifts, axes = arguments_of(node)
    if not axes:
        raise CannotExpress(
            "roll over all elements has no form", 'Roll along axes, or use "litert"'
        )
    value = _given(lowering, node)
    rolled = value.node
    for shift, axis in zip(shifts, axes, strict=True):
        size = lowering.shape(node)[axis]
        cut = -shift % size
        halves = [
            lowering.call(_ATEN.slice.Tensor, rolled, axis, *ends)
            for ends in ((cut, size), (0, cut))
        ]
        rolled = lowering.call(_ATEN.cat.default, halves if cut else halves[:1], axis)
    return Value(rolled, value.qparams)


def _unbind(lowering: Lowering, node: fx.Node) -> Value:
    """`unbind` itself emits nothing; each `getitem` becomes a `select`."""
    return _given(lowering, node)


def _getitem(lowering: Lowering, node: fx.Node) -> Value:
    whole, index = arguments_of(node)
    if whole.target is _ATEN.adaptive_max_pool2d.default:
        if index:
            raise CannotExpress("the indices of adaptive_max_pool2d have no form")
        return _given(lowering, node)
    if whole.target is _ATEN._native_batch_norm_legit_no_training.default:
        return _given(lowering, node)
    if whole.target is not _ATEN.unbind.int:
        return _same(lowering, node)
    axis = arguments_of(whole)[1]
    return _moved(lowering, node, _ATEN.select.int, axis, index)


def _channel_shuffle(lowering: Lowering, node: fx.Node) -> Value:
    groups = arguments_of(node)[1]
    batch, channels, *size = lowering.shape(node)
    split = [batch, groups, channels // groups, *size]
    value = _moved(lowering, node, _ATEN.reshape.default, split)
    turned = lowering.call(_ATEN.transpose.int, value.node, 1, 2)
    joined = lowering.call(_ATEN.reshape.default, turned, [batch, channels, *size])
    return Value(joined, value.qparams)


def _pad(lowering: Lowering, node: fx.Node) -> Value:
    if node.target is _ATEN.constant_pad_nd.default:
        (_, amounts, fill), mode = arguments_of(node), "constant"
    else:
        _, amounts, mode, fill = arguments_of(node)
    if mode == "reflect" and len(amounts) == 4:
        return _moved(lowering, node, _ATEN.reflection_pad2d.default, amounts)
    if mode != "constant":
        raise CannotExpress(f"padding of mode {mode!r} has no form for these dimensions")
    if fill and _given(lowering, node).qparams is not None:
        raise CannotExpress(f"padding with {fill} instead of 0 would need another grid")
    return _moved(lowering, node, _ATEN.constant_pad_nd.default, amounts, fill or 0)


def _identity(lowering: Lowering, node: fx.Node) -> Value:
    return _given(lowering, node)


def _copy(lowering: Lowering, node: fx.Node) -> Value:
    """The functional form of an in-place operator: its second argument is the new value."""
    value = lowering.value(node.args[1])
    assert value is not None
    return value


# Several tensors


def _cat(lowering: Lowering, node: fx.Node) -> Value:
    items, axis = arguments_of(node)
    nodes, qparams = _with_one_qparams(lowering, node, items)
    return Value(lowering.call(_ATEN.cat.default, nodes, axis), qparams)


def _stack(lowering: Lowering, node: fx.Node) -> Value:
    items, axis = arguments_of(node)
    nodes, qparams = _with_one_qparams(lowering, node, items)
    rows = [lowering.call(_ATEN.unsqueeze.default, item, axis) for item in nodes]
    axis %= len(lowering.shape(node))
    return Value(lowering.call(_ATEN.cat.default, rows, axis), qparams)


def _with_one_qparams(
    lowering: Lowering, node: fx.Node, items: list[fx.Node]
) -> tuple[list[fx.Node], QParams | None]:
    """Requantize the inputs of a CONCATENATION: they and its output must have the same qparams."""
    inputs = [pair[1] for pair in lowering.quantized(*items) or ()]
    if inputs and all(qparams.equal(inputs[0]) for qparams in inputs):
        output: QParams | None = inputs[0]
    else:
        output = lowering.output_qparams(node)
    if output is None:
        return [lowering.real(item) for item in items], None
    values = [value for item in items if (value := lowering.value(item)) is not None]
    return [lowering.requantized(value, output).node for value in values], output


VALUE_PRESERVING: Mapping[Any, LowerFunction] = {
    _ATEN.relu.default: _clamp,
    _ATEN.relu6.default: _clamp,
    _ATEN.hardtanh.default: _clamp,
    _ATEN.clamp.default: _clamp,
    _ATEN.clamp_min.default: _clamp,
    _ATEN.max_pool2d.default: _same,
    _ATEN.adaptive_max_pool2d.default: _adaptive_max_pool2d,
    _ATEN.upsample_nearest2d.vec: _same,
    _ATEN.view.default: _reshape,
    _ATEN.reshape.default: _reshape,
    _ATEN.permute.default: _same,
    _ATEN.transpose.int: _same,
    _ATEN.t.default: _t,
    _ATEN.unsqueeze.default: _same,
    _ATEN.squeeze.dim: _same,
    _ATEN.squeeze.dims: _same,
    _ATEN.slice.Tensor: _same,
    _ATEN.select.int: _same,
    _ATEN.index_select.default: _same,
    _ATEN.split.Tensor: _same,
    _ATEN.split_with_sizes.default: _same,
    _ATEN.unbind.int: _unbind,
    operator.getitem: _getitem,
    _ATEN.expand.default: _same,
    _ATEN.repeat.default: _same,
    _ATEN.tile.default: _tile,
    _ATEN.flip.default: _same,
    _ATEN.roll.default: _roll,
    _ATEN.pixel_shuffle.default: _same,
    _ATEN.pixel_unshuffle.default: _same,
    _ATEN.channel_shuffle.default: _channel_shuffle,
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.pad.default: _pad,
    _ATEN.clone.default: _identity,
    _ATEN.contiguous.default: _identity,
    _ATEN.copy.default: _copy,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
}
"""Every value-preserving operator that is lowered."""
