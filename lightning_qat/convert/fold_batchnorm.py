"""Fold batch norms, and factors, of a captured graph into the layers before them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lightning_qat.convert.batchnorm import BatchNormStatistics
from lightning_qat.ir.exported_program import Constants, module_path
from lightning_qat.ir.ops import DEQUANTIZE, DequantizeCall, as_dequantize
from lightning_qat.layers.table import CHANNEL_AXES
from lightning_qat.numerics.qparams import QParams

_ATEN = torch.ops.aten


def fold_batchnorms(program: ExportedProgram) -> dict[str, int]:
    """Fold every evaluating batch norm whose input is a layer's output and nothing else reads it.

    A multiplication with a number (``conv(x) * 0.1``), which is a batch norm of this ``gamma`` and
    nothing else, is folded into a layer with a scale per channel.

    The folded program computes the same function: integers are negated where a factor is negative,
    scales multiplied by its size (see ``batchnorm``). Float layers are folded too.

    Args:
        program: Changed in place; constants that are no longer read stay until they are dropped.

    Returns:
        Key of each weight whose integers saturated, with how many did. Empty for the grids of
        ``IntegerGrid.weight``.
    """
    saturated: dict[str, int] = {}
    constants = Constants(program)
    calls = [as_dequantize(node) for node in program.graph.nodes]
    uses = Counter(call.key for call in calls if call is not None)
    for node in list(program.graph.nodes):
        if node.target is not _ATEN.batch_norm.default and node.target not in _FACTORS:
            continue
        layer = node.args[0]
        if not isinstance(layer, fx.Node) or layer.target not in CHANNEL_AXES:
            continue
        if len(layer.users) != 1:
            continue
        # A batch norm normalises axis 1, which is a linear layer's feature axis in 2-D only.
        is_linear = layer.target is _ATEN.linear.default
        if node.target in _FACTORS:
            statistics = _factor(constants, node, -1 if is_linear else 1)
        elif is_linear and layer.meta["val"].dim() != 2:
            continue
        else:
            statistics = _statistics(constants, node)
        weight = layer.args[1]
        if statistics is None or not isinstance(weight, fx.Node):
            continue
        arguments: list[Any] = list(layer.args)
        bias_node = arguments[2] if len(arguments) > 2 else None
        bias = constants.value(bias_node)
        if bias is None and bias_node is not None:
            continue
        new_weight = _fold_weight(constants, layer, weight, statistics, uses, saturated)
        if new_weight is None:
            continue
        name = f"{module_path(layer)}.folded_bias".lstrip(".")
        new_bias = constants.add(name, statistics.fold_bias(bias))
        layer.args = (arguments[0], new_weight, new_bias, *arguments[3:])
        node.replace_all_uses_with(layer)
        program.graph.erase_node(node)
    return saturated


def _fold_weight(
    constants: Constants,
    layer: fx.Node,
    weight: fx.Node,
    statistics: BatchNormStatistics,
    uses: Counter[str],
    saturated: dict[str, int],
) -> fx.Node | None:
    axis = CHANNEL_AXES[layer.target]
    path = module_path(layer)
    value = constants.value(weight)
    if value is not None:
        name = f"{path}.folded_weight".lstrip(".")
        return constants.add(name, statistics.fold_weight(value, axis))
    call = as_dequantize(weight)
    if call is None:
        return None
    integers, scale = constants.value(call.integers), constants.value(call.scale)
    if integers is None or scale is None:
        return None
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), call.grid, call.axis)
    integers, folded, lost = statistics.fold_integers(integers, qparams, axis)
    key = call.key
    if uses[key] > 1:
        # A layer called several times may meet a different batch norm each time.
        uses[key] -= 1
        key = f"{key}_{uses[key]}"
    if lost:
        saturated[key] = lost
    nodes = [
        constants.add(f"{path}.{name}".lstrip("."), tensor)
        for name, tensor in (("folded_integers", integers), ("folded_scale", folded.scale))
    ]
    with layer.graph.inserting_before(layer):
        new = DequantizeCall(nodes[0], nodes[1], folded.grid, folded.axis, key)
        node: fx.Node = layer.graph.call_function(DEQUANTIZE, new.args)
    node.meta.update(weight.meta)
    return node


_FACTORS = (_ATEN.mul.Tensor, _ATEN.div.Tensor)


def _factor(constants: Constants, node: fx.Node, axis: int) -> BatchNormStatistics | None:
    """A batch norm that multiplies with one number; ``None``: the node does something else."""
    layer, number = node.args
    assert isinstance(layer, fx.Node)
    weight = as_dequantize(layer.args[1])
    known = constants.value(number)
    shape = layer.meta["val"].shape
    if isinstance(number, fx.Node) and (known is None or known.numel() != 1):
        return None
    if node.meta["val"].shape != shape:
        return None
    value = float(number) if known is None else float(known)  # type: ignore[arg-type]
    if node.target is _ATEN.div.Tensor:
        value = 1.0 / value if value else 0.0
    if weight is None or weight.axis is None or not value:
        return None
    ones = torch.ones(shape[axis])
    return BatchNormStatistics(ones * value, None, ones * 0.0, ones, 0.0)


def _statistics(constants: Constants, node: fx.Node) -> BatchNormStatistics | None:
    args: Any = node.args
    _, gamma, beta, mean, var, training, _, eps = args[:8]
    values = {n: constants.value(n) for n in (gamma, beta, mean, var) if n is not None}
    if training or mean is None or any(value is None for value in values.values()):
        return None
    found: Any = values
    return BatchNormStatistics(
        found.get(gamma), found.get(beta), found[mean], found[var], float(eps)
    )
