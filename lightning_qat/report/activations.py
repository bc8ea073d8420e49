"""Every quantized activation on a few samples: its histogram, what is clipped, its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lightning_qat.export.compare.segments import segments
from lightning_qat.export.compare.tensor_errors import grid_use, tensor_errors
from lightning_qat.export.protocol import Array
from lightning_qat.ir.quantize_calls import QuantizeCall
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat.report.data import Histogram, TensorRow

BINS = 64
"""Of every histogram: what is seen on a figure of 260 pixels."""


def measured_tensors(
    model: QuantizedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[TensorRow, ...]:
    """One row per quantization of an activation, in the order of the graph."""
    made = segments(model)
    rows: list[TensorRow] = []

    def watch(call: QuantizeCall, before: Tensor, after: Tensor) -> None:
        qparams = model.tensors[call.key].qparams
        row = tensor_row(call.name, made[call.name].made_by, qparams)
        real = before.float().numpy()
        if real.size and np.isfinite(real).all():
            use = grid_use(real, qparams)
            errors = tensor_errors(real, after.float().numpy(), row.scale)
            figures = {"clipped": use.clipped, "unused": use.unused, "sqnr_db": errors.sqnr_db}
            histogram = _histogram(real, row)
            row = TensorRow(**{**vars(row), **figures, "histogram": histogram})
        rows.append(row)

    model.watched(args, kwargs, watch)
    return tuple(rows)


def tensor_row(name: str, made_by: str, qparams: QParams) -> TensorRow:
    """What is known of an activation without running it."""
    grid, scale, zero_point = qparams.grid, float(qparams.scale), int(qparams.zero_point)
    return TensorRow(
        name,
        made_by,
        bits_of(grid),
        zero_point == (grid.qmin + grid.qmax + 1) // 2,
        scale,
        zero_point,
        scale * (grid.qmin - zero_point),
        scale * (grid.qmax - zero_point),
    )


def bits_of(grid: IntegerGrid) -> int:
    """How many bits a recipe says for a grid.

    A batch norm with negative factors mirrors -8 .. 7 in some channels: -8 .. 8 is still 4 bits.

    Example:
        >>> [bits_of(IntegerGrid(*ends)) for ends in ((-127, 127), (-8, 7), (-8, 8))]
        [8, 4, 4]
    """
    return (max(-grid.qmin, grid.qmax) - 1).bit_length() + 1


def _histogram(real: Array, row: TensorRow) -> Histogram:
    low = min(row.low, float(real.min()))
    high = max(row.high, float(real.max()))
    counts, _ = np.histogram(real, BINS, (low, high))
    return Histogram(low, high, tuple(map(int, counts)), row.low, row.high, row.scale, 0.0, "value")
