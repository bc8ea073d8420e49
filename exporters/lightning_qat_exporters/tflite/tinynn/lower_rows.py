"""Lower pools and resizing, of rows as those of pictures of height 1."""

from __future__ import annotations

import torch
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of, per_axis
from lightning_qat_exporters.tflite.tinynn.lowering import Lowering, Value
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten


def as_picture(lowering: Lowering, rows: fx.Node) -> fx.Node:
    """Give rows, (..., channels, length), a height of 1 in front of the length."""
    return lowering.call(_ATEN.unsqueeze.default, rows, -2)


def as_rows(lowering: Lowering, value: Value) -> Value:
    """Take the height of 1 of a picture away."""
    return Value(lowering.call(_ATEN.squeeze.dim, value.node, -2), value.qparams)


def max_pool1d(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.max_pool1d``."""
    _, kernel, stride, padding, dilation, ceil = arguments_of(node)
    options = [
        [outside, *per_axis(option, 1)]
        for outside, option in ((1, kernel), (1, stride or kernel), (0, padding), (1, dilation))
    ]
    return _max_pool_of_rows(lowering, node, *options, ceil)


def adaptive_max_pool(lowering: Lowering, node: fx.Node) -> Value:
    """Lower adaptive max pools with windows of one size; ``getitem`` refuses the indices."""
    source, after = arguments_of(node)
    before = lowering.shape(source)[-len(after) :]
    kernel = [b // a for b, a in zip(before, after, strict=True)]
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise CannotExpress(f"windows of unequal size: {tuple(before)} to {tuple(after)}")
    if len(kernel) == 1:
        return _max_pool_of_rows(lowering, node, [1, *kernel], [1, *kernel])
    return lowering.moved(node, _ATEN.max_pool2d.default, kernel, kernel)


def _max_pool_of_rows(lowering: Lowering, node: fx.Node, *options: object) -> Value:
    value = lowering.given(node)
    picture = as_picture(lowering, value.node)
    pooled = lowering.call(_ATEN.max_pool2d.default, picture, *options)
    return as_rows(lowering, Value(pooled, value.qparams))


def largest(lowering: Lowering, node: fx.Node) -> Value:
    """Lower the largest or smallest value over some axes; ``getitem`` refuses where it is."""
    x, axes, keepdim = arguments_of(node)
    rank = len(lowering.shape(x))
    axes = per_axis(axes, 1) if isinstance(axes, int) else list(axes) or list(range(rank))
    name = str(node.target).removeprefix("aten.").split(".")[0]
    value = lowering.given(node)
    options = ([axis % rank for axis in axes], bool(keepdim))
    if value.qparams is None:
        operator = _ATEN.amax.default if name.endswith("max") else _ATEN.amin.default
        return Value(lowering.call(operator, value.node, *options), None)
    function = "amax" if name.endswith("max") else "amin"
    return lowering.emit(OPS.extreme.default, value.node, *options, function, qparams=value.qparams)


def nearest(lowering: Lowering, node: fx.Node) -> Value:
    """Lower resizing rows to the nearest value, and ``nearest-exact`` of rows and pictures.

    ``nearest-exact`` measures from the middle of values; where sizes grow by whole factors, that
    is the same.
    """
    source, after = lowering.shape(arguments_of(node)[0]), lowering.shape(node)
    if "exact" in str(node.target) and any(a % b for b, a in zip(source, after, strict=True)):
        raise CannotExpress(
            "mode 'nearest-exact' has a form for whole factors only",
            'Use mode "nearest", or backend="litert"',
        )
    return resized(lowering, node, _ATEN.upsample_nearest2d.vec)


def resized(lowering: Lowering, node: fx.Node, operator: object, *options: object) -> Value:
    """Resize a picture, or rows as one, to the size that an operator gives."""
    value, shape = lowering.given(node), lowering.shape(node)
    of_rows = len(shape) == 3
    picture = as_picture(lowering, value.node) if of_rows else value.node
    size = [1, shape[2]] if of_rows else list(shape[2:])
    found = Value(lowering.call(operator, picture, size, *options, None), value.qparams)
    return as_rows(lowering, found) if of_rows else found
