"""Learned grids on a GPU: one launch forward, two backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_qat.numerics.gpu.activations import (
    RUNS,
    constants_of,
    dense,
    fake_quantize,
    split,
)
from lightning_qat.numerics.gpu.device_grid import DeviceGrid, GridRule
from lightning_qat.numerics.gpu.launch import launch
from lightning_qat.numerics.gpu.straight_through import int_repr_of_codes
from lightning_qat.numerics.int_repr import IntRepr, attach_int_repr
from lightning_qat.numerics.kernels.loops import ALL

_SUMS_AT_ONCE = 1024


def learned_fake_quantize(
    x: Tensor,
    grid: DeviceGrid,
    factor: float,
    *,
    clamped: tuple[float, float] | None = None,
    saves_input: bool = False,
    carries_int_repr: bool = False,
    known: Tensor | IntRepr | None = None,
) -> Tensor:
    """Round a tensor to a learned grid, with the gradients of ``learned_fake_quantize``.

    Args:
        x: A tensor that the kernels take.
        grid: Its two tensors are the parameters, to which the gradients go.
        factor: Gradients of the parameters are multiplied by it.
        clamped: Clamp to 0 and an upper end first, which may be infinite.
        saves_input: Backward may keep ``x`` itself.
        carries_int_repr: The result carries its integers.
        known: The values or integers of the result, if they are known.
    """
    kept: list[IntRepr] = [known] if isinstance(known, IntRepr) else []
    result: Tensor = _LearnedOnDevice.apply(  # type: ignore[no-untyped-call]
        x,
        grid.first,
        grid.second,
        grid,
        factor,
        clamped,
        saves_input,
        carries_int_repr,
        known,
        kept,
    )
    if kept:
        attach_int_repr(result, kept[0])
    return result


class _LearnedOnDevice(torch.autograd.Function):
    """Keeps the input; the gradients of the parameters are those of the parameters themselves."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first: Tensor,
        second: Tensor,
        grid: DeviceGrid,
        factor: float,
        clamped: tuple[float, float] | None,
        saves_input: bool,
        carries_int_repr: bool,
        known: Tensor | IntRepr | None,
        kept: list[IntRepr],
    ) -> Tensor:
        grid = grid._replace(first=first, second=second)
        if isinstance(known, IntRepr):
            result = known.restore(x.dtype)
        elif known is not None:
            result = known.detach()
        else:
            quantized = fake_quantize(x, grid, clamp=clamped or ALL, keeps_codes=carries_int_repr)
            result = quantized.values
            if quantized.codes is not None:
                kept.append(int_repr_of_codes(quantized.codes, quantized.numbers, len(x.shape)))
        ctx.save_for_backward(x if saves_input else x.clone(), first, second)
        ctx.rule, ctx.grid, ctx.factor, ctx.clamped = grid.rule, grid.grid, factor, clamped
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, first, second = ctx.saved_tensors
        grid = DeviceGrid(ctx.rule, first, second, ctx.grid)
        of_x, of_first, of_second = learned_backward(grads[0], x, grid, ctx.factor, ctx.clamped)
        return of_x, of_first, of_second, *[None] * 7


def learned_backward(
    grad: Tensor,
    x: Tensor,
    grid: DeviceGrid,
    factor: float,
    clamped: tuple[float, float] | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of the values and of the two tensors of the grid.

    Args:
        grad: Gradient of the result.
        x: The tensor that was quantized.
        grid: Its grid.
        factor: See ``learned_fake_quantize``.
        clamped: Alike.

    Returns:
        The three; ``None`` for a tensor that stands there for the other one only.
    """
    x, rows = dense(x), grid.first.numel()
    of_x = torch.empty_like(x, dtype=grad.dtype)
    if grad.stride() != of_x.stride():
        grad = torch.empty_like(of_x).copy_(grad)
    cols, chunks = split(x, rows)
    sums = torch.empty((rows, chunks, 2), dtype=torch.float32, device=x.device)
    constants = constants_of(grid)
    launch(
        "learned_backward",
        rows * chunks,
        (grad, x, grid.first, grid.second),
        (of_x, sums),
        (cols, chunks, math.inf if clamped is None else clamped[1]),
        {**constants, "CLAMPED": clamped is not None, "RUNS": RUNS},
    )
    of_first = torch.empty_like(grid.first) if grid.rule in _LEARNS_FIRST else None
    of_second = torch.empty_like(grid.second) if grid.rule in _LEARNS_SECOND else None
    block = min(_SUMS_AT_ONCE, 1 << max(chunks - 1, 0).bit_length())
    launch(
        "learned_finish",
        rows,
        (sums, grid.first, grid.second),
        (of_first, of_second),
        (chunks, factor),
        {**constants, "BLOCK": block},
    )
    return of_x, of_first, of_second


_LEARNS_FIRST = (
    GridRule.HALF_WIDTH,
    GridRule.HALF_WIDTH_FROM_ZERO,
    GridRule.HALF_WIDTH_AND_LOW,
    GridRule.RANGE,
)
_LEARNS_SECOND = (
    GridRule.HALF_WIDTH_AND_LOW,
    GridRule.RANGE,
    GridRule.RANGE_FROM_ZERO,
    GridRule.SYMMETRIC_CLIP,
)
