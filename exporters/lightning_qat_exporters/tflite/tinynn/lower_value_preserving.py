"""Lower value-preserving operators, which move, select or clamp values.

Their output has the qparams of their input, so the same operator on integers is exact.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.tinynn.lower_clamps import clamp
from lightning_qat_exporters.tflite.tinynn.lower_rows import (
    adaptive_max_pool,
    largest,
    max_pool1d,
    nearest,
)
from lightning_qat_exporters.tflite.tinynn.lower_selections import (
    getitem,
    index,
    repeat_interleave,
    roll,
    unbind,
)
from lightning_qat_exporters.tflite.tinynn.lowering import LowerFunction, Lowering, Value

_ATEN = torch.ops.aten

# Moves and selections


def same(lowering: Lowering, node: fx.Node) -> Value:
    """Lower an operator to itself, on integers where they are."""
    return lowering.moved(node, node.target)


def _reshape(lowering: Lowering, node: fx.Node) -> Value:
    return lowering.moved(node, _ATEN.reshape.default, lowering.concrete(node.args[1]))


def _t(lowering: Lowering, node: fx.Node) -> Value:
    if len(lowering.shape(node)) < 2:
        return lowering.given(node)
    return lowering.moved(node, _ATEN.transpose.int, -2, -1)


def _tile(lowering: Lowering, node: fx.Node) -> Value:
    times = list(arguments_of(node)[1])
    missing = len(lowering.shape(node)) - len(times)
    return lowering.moved(node, _ATEN.repeat.default, [1] * missing + times)


def _channel_shuffle(lowering: Lowering, node: fx.Node) -> Value:
    groups = arguments_of(node)[1]
    batch, channels, *size = lowering.shape(node)
    split = [batch, groups, channels // groups, *size]
    value = lowering.moved(node, _ATEN.reshape.default, split)
    turned = lowering.call(_ATEN.transpose.int, value.node, 1, 2)
    joined = lowering.call(_ATEN.reshape.default, turned, [batch, channels, *size])
    return Value(joined, value.qparams)


def _pad(lowering: Lowering, node: fx.Node) -> Value:
    if node.target is _ATEN.constant_pad_nd.default:
        (_, amounts, fill), mode = arguments_of(node), "constant"
    else:
        _, amounts, mode, fill = arguments_of(node)
    if mode == "reflect" and len(amounts) == 4:
        return lowering.moved(node, _ATEN.reflection_pad2d.default, amounts)
    if mode != "constant":
        raise CannotExpress(f"padding of mode {mode!r} has no form for these dimensions")
    if fill and lowering.given(node).qparams is not None:
        raise CannotExpress(f"padding with {fill} instead of 0 would need another grid")
    return lowering.moved(node, _ATEN.constant_pad_nd.default, amounts, fill or 0)


def _identity(lowering: Lowering, node: fx.Node) -> Value:
    return lowering.given(node)


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
    _ATEN.relu.default: clamp,
    _ATEN.relu6.default: clamp,
    _ATEN.hardtanh.default: clamp,
    _ATEN.clamp.default: clamp,
    _ATEN.clamp_min.default: clamp,
    _ATEN.clamp_max.default: clamp,
    _ATEN.max_pool1d.default: max_pool1d,
    _ATEN.max_pool2d.default: same,
    _ATEN.adaptive_max_pool1d.default: adaptive_max_pool,
    _ATEN.adaptive_max_pool2d.default: adaptive_max_pool,
    _ATEN.amax.default: largest,
    _ATEN.amin.default: largest,
    _ATEN.max.dim: largest,
    _ATEN.min.dim: largest,
    _ATEN.upsample_nearest1d.vec: nearest,
    _ATEN.upsample_nearest2d.vec: same,
    _ATEN._upsample_nearest_exact1d.vec: nearest,
    _ATEN._upsample_nearest_exact2d.vec: nearest,
    _ATEN.view.default: _reshape,
    _ATEN._unsafe_view.default: _reshape,
    _ATEN.reshape.default: _reshape,
    _ATEN.permute.default: same,
    _ATEN.transpose.int: same,
    _ATEN.t.default: _t,
    _ATEN.unsqueeze.default: same,
    _ATEN.squeeze.dim: same,
    _ATEN.squeeze.dims: same,
    _ATEN.slice.Tensor: same,
    _ATEN.select.int: same,
    _ATEN.index_select.default: same,
    _ATEN.index.Tensor: index,
    _ATEN.repeat_interleave.self_int: repeat_interleave,
    _ATEN.split.Tensor: same,
    _ATEN.split_with_sizes.default: same,
    _ATEN.unbind.int: unbind,
    operator.getitem: getitem,
    _ATEN.expand.default: same,
    _ATEN.repeat.default: same,
    _ATEN.tile.default: _tile,
    _ATEN.flip.default: same,
    _ATEN.roll.default: roll,
    _ATEN.pixel_shuffle.default: same,
    _ATEN.pixel_unshuffle.default: same,
    _ATEN.channel_shuffle.default: _channel_shuffle,
    _ATEN.constant_pad_nd.default: _pad,
    _ATEN.pad.default: _pad,
    _ATEN.clone.default: _identity,
    _ATEN.detach.default: _identity,
    _ATEN.alias.default: _identity,
    _ATEN.lift_fresh_copy.default: _identity,
    _ATEN.contiguous.default: _identity,
    _ATEN.copy.default: _copy,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
}
"""Every value-preserving operator that is lowered."""
