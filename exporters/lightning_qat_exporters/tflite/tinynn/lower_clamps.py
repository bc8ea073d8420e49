"""Lower clamps: part of the kernel in front of them, or operators on integers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from lightning_qat.ir.operators import CLAMPS
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of
from lightning_qat_exporters.tflite.tinynn.lowering import INT8, Lowering, Value
from lightning_qat_exporters.tflite.tinynn.ops import OPS

_ATEN = torch.ops.aten

_FUSABLE = {(0.0, math.inf): "relu", (0.0, 6.0): "relu6", (-1.0, 1.0): "relu_n1_to_1"}


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
    if target is _ATEN.clamp_max.default:
        return -math.inf, float(arguments[1])
    # Only overloads whose ends are numbers: `aten.clamp.default`, not `aten.clamp.Tensor`.
    clamp = CLAMPS.get(str(target).removeprefix("aten.").removesuffix(".default"))
    if clamp is None:
        return None
    low, high = arguments[1:3] if clamp.arguments else (clamp.low, clamp.high)
    return (
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


def clamp(lowering: Lowering, node: fx.Node) -> Value:
    """Lower a clamp; nothing where a kernel has it as part, or where no value is outside."""
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
            limit = lowering.on_grid(torch.tensor([bound]), qparams)
            value = lowering.emit(
                OPS.binary.default, value.node, limit, name, "none", qparams=qparams
            )
    return value


def _nearest(bound: float, qparams: QParams) -> float:
    """The integer next to a real bound, also outside the range of integers."""
    steps = bound / float(qparams.scale)
    return (round(steps) if math.isfinite(steps) else steps) + int(qparams.zero_point)
