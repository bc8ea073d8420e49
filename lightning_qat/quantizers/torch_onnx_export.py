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
    """Whether ``torch.onnx.export`` is running, in either form."""
    # In either form something records the calls, which is cheaper to ask.
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return recorded and torch.onnx.is_in_onnx_export()


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

    Raises:
        ValueError: The older exporter (``dynamo=False``) runs, and the grid is not of 8 bits.
    """
    if not torch.compiler.is_exporting():
        return _traced(x, scale, zero_point, grid, axis)
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


def _traced(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None
) -> Tensor:
    """The operator of torch for which the older exporter writes the pair."""
    low, high = _TYPE_GRIDS[torch.int8]
    if grid.qmax != high or grid.qmin not in (low, low + 1):
        raise ValueError(
            "torch.onnx.export(dynamo=False) writes quantizers of 8 bits only; the model has one "
            f"with integers from {grid.qmin} to {grid.qmax}. Call it with dynamo=True."
        )
    # Final numbers: the tracer would write down how they are computed.
    scale = torch.tensor(scale.tolist(), dtype=torch.float32)
    zero_point = torch.tensor(zero_point.tolist(), dtype=torch.int32)
    # A weight of its scale never reaches -128.
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, low, high)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, low, high)
