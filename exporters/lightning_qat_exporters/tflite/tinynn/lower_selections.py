"""Lower operators that select values by an index, all on integers where they are."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.tinynn.lowering import Lowering, Value

_ATEN = torch.ops.aten

_WITH_INDICES = (
    _ATEN.adaptive_max_pool1d.default,
    _ATEN.adaptive_max_pool2d.default,
    _ATEN.max.dim,
    _ATEN.min.dim,
)
"""Operators that give values and where they are."""


def roll(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.roll`` along axes to two slices and a concatenation each."""
    _, shifts, axes = arguments_of(node)
    if not axes:
        raise CannotExpress(
            "roll over all elements has no form", 'Roll along axes, or use "litert"'
        )
    value = lowering.given(node)
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


def unbind(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``aten.unbind`` to nothing: each ``getitem`` of it becomes a ``select``."""
    return lowering.given(node)


def getitem(lowering: Lowering, node: fx.Node) -> Value:
    """Lower the choice of one result of an operator that gives several."""
    whole, number = arguments_of(node)
    if whole.target in _WITH_INDICES:
        if number:
            name = str(whole.target).removeprefix("aten.").removesuffix(".default")
            raise CannotExpress(f"the indices of {name} have no form")
        return lowering.given(node)
    if whole.target is _ATEN._native_batch_norm_legit_no_training.default:
        return lowering.given(node)
    if whole.target is not _ATEN.unbind.int:
        return lowering.moved(node, node.target)
    axis = arguments_of(whole)[1]
    return lowering.moved(node, _ATEN.select.int, axis, number)


def index(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``x[:, [2, 0, 1]]``: constant indices along one axis."""
    x, indices = arguments_of(node)
    given = [(axis, found) for axis, found in enumerate(indices) if found is not None]
    if len(given) != 1:
        raise CannotExpress("indexing by several tensors at once has no form")
    ((axis, found),) = given
    rows = lowering.constant(found)
    if rows is None:
        raise CannotExpress("indices that are computed have no form")
    if rows.dtype is torch.bool:
        if rows.dim() != 1:
            raise CannotExpress("a mask over several axes has no form")
        rows = rows.nonzero().flatten()
    value = _selected(lowering, node, axis, rows % lowering.shape(x)[axis])
    if rows.dim() == 1:
        return value
    shape = list(lowering.shape(node))
    return Value(lowering.call(_ATEN.reshape.default, value.node, shape), value.qparams)


def repeat_interleave(lowering: Lowering, node: fx.Node) -> Value:
    """Lower ``repeat_interleave`` along an axis to a selection of every value several times."""
    x, times, axis = arguments_of(node)[:3]
    if axis is None:
        raise CannotExpress("repeat_interleave over all elements has no form", "Give it dim")
    size = lowering.shape(x)[axis]
    return _selected(lowering, node, axis, torch.arange(size).repeat_interleave(times))


def _selected(lowering: Lowering, node: fx.Node, axis: int, rows: Tensor) -> Value:
    chosen = lowering.attribute(rows.flatten().long())
    return lowering.moved(node, _ATEN.index_select.default, axis, chosen)
