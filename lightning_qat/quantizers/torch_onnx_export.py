"""A model in training, exported by ``torch.onnx.export`` itself: QuantizeLinear, DequantizeLinear.

For those who export a QAT model as an intermediate file and convert it elsewhere. ``convert`` and
``export`` do not come here: they make numbers final first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.qparams import IntegerGrid

_TYPE_GRIDS = {torch.int8: (-128, 127), torch.int16: (-32768, 32767)}


def is_exporting_onnx() -> bool:
    """Whether ``torch.onnx.export`` is capturing; its older exporter (``dynamo=False``) is not."""
    return torch.onnx.is_in_onnx_export() and torch.compiler.is_exporting()


def quantize_dequantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None = None
) -> Tensor:
    """``QuantizeLinear -> [Clip] -> DequantizeLinear`` in the graph that is being captured.

    Args:
        x: Real values.
        scale: Scalar, or one per channel of ``axis``.
        zero_point: The shape of ``scale``.
        grid: The integers in use; ``Clip`` where they are fewer than their type has. A weight's
            -127..127 needs none: no weight of its scale reaches -128. 16 bits need opset 21.
        axis: Channel axis of ``scale``.

    Returns:
        Real values on the grid, the shape and dtype of ``x``.
    """
    symbolic = torch.onnx.ops.symbolic
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    zero_point = zero_point.to(grid.dtype)
    integers = symbolic(
        "QuantizeLinear", (x, scale, zero_point), dict(attributes), dtype=grid.dtype, shape=x.shape
    )
    low, high = _TYPE_GRIDS[grid.dtype]
    if grid.qmax < high or grid.qmin > low + 1:
        ends = (torch.tensor(end, dtype=grid.dtype) for end in (grid.qmin, grid.qmax))
        integers = symbolic("Clip", (integers, *ends), dtype=grid.dtype, shape=x.shape)
    return symbolic(
        "DequantizeLinear", (integers, scale, zero_point), attributes, dtype=x.dtype, shape=x.shape
    )
