"""Fake quantization of a tensor on a GPU: one launch forward, one backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.numerics.gpu.device_grid import DeviceGrid
from lightning_qat.numerics.gpu.launch import launch, runs_kernels, suits
from lightning_qat.numerics.gpu.range_rows import fresh_range
from lightning_qat.numerics.kernels.build import RUN
from lightning_qat.numerics.kernels.loops import ALL
from lightning_qat.numerics.memory_layout import fills_its_memory, room_for_bits, rows_of

RUNS = 4
"""Runs that one program takes: 16 values for each of its 128 threads."""


class Quantized(NamedTuple):
    """The results of ``fake_quantize``.

    Args:
        values: Real values on the grid, of the dtype of the input.
        bits: The elements whose gradient passes; see ``pack_bits``.
        codes: The integers of the grid.
        numbers: float32 ``(2, rows)``: scale and zero point of each row, with the codes.
        range: float32 ``(2,)``: the ``(-min, max)`` of the input.
    """

    values: Tensor
    bits: Tensor | None
    codes: Tensor | None
    numbers: Tensor | None
    range: Tensor | None


def fake_quantize(
    x: Tensor,
    grid: DeviceGrid,
    *,
    clamp: tuple[float, float] = ALL,
    keeps_bits: bool = False,
    keeps_codes: bool = False,
    observes: bool = False,
) -> Quantized:
    """Round a tensor to a grid, and what else is wanted, in one launch.

    Args:
        x: A tensor that ``suits``; one with gaps in memory is copied first.
        grid: The grid; of several rows where its tensors hold a number per row of the first axis.
        clamp: Real values that the tensor is clamped to first, numbers of its dtype, infinite where
            it is not. The gradient passes strictly between them.
        keeps_bits: Bits are wanted; of one row only.
        keeps_codes: Integers are wanted.
        observes: The range is wanted.
    """
    x, rows = dense(x), grid.first.numel()
    quantized = Quantized(
        torch.empty_like(x),
        room_for_bits(x) if keeps_bits else None,
        torch.empty_like(x, dtype=grid.grid.dtype) if keeps_codes else None,
        x.new_empty((2, rows), dtype=torch.float32) if keeps_codes else None,
        fresh_range(x.device) if observes else None,
    )
    cols, chunks = split(x, rows)
    launch(
        "fake_quantize",
        rows * chunks,
        (x, grid.first, grid.second),
        quantized,
        (cols, chunks, int(grid.second.numel() > 1), *clamp),
        {
            **constants_of(grid),
            "BITS": keeps_bits,
            "CODES": keeps_codes,
            "OBSERVE": observes,
            "RUNS": RUNS,
        },
    )
    return quantized


def value_range(x: Tensor, ends: tuple[float, float] = ALL) -> Tensor | None:
    """``(-min, max)`` of values clamped to ``ends``; ``None``: no kernel knows the tensor."""
    if not (x.numel() and suits(x)):
        return None
    x, found = dense(x.detach()), fresh_range(x.device)
    cols, chunks = split(x, 1)
    launch("value_range", chunks, (x,), (found,), (cols, *ends), {"RUNS": RUNS})
    return found


def masked(grad: Tensor, bits: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor | None:
    """A gradient where its bit is set, zero elsewhere; arguments as ``kernels.loops.masked``."""
    if not suits(grad) or grad.device != bits.device:
        return None
    result = torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device)
    if grad.stride() != stride:
        grad = torch.empty_like(result).copy_(grad)
    cols, chunks = split(result, 1)
    launch("masked", chunks, (grad, bits), (result,), [cols], {"RUNS": RUNS})
    return result


def restore(
    codes: Tensor, scale: Tensor, zero_point: Tensor | float, dtype: torch.dtype
) -> Tensor | None:
    """``(integer - zero_point) * scale`` in a dtype, of integers without gaps in memory.

    ``None``: the kernels do not know them.
    """
    if is_compiling() or not runs_kernels(codes.device):
        return None
    rows = rows_of(codes, scale)
    from_zero = isinstance(zero_point, float)
    if rows is None or (from_zero and zero_point != 0.0):
        return None
    values = torch.empty_like(codes, dtype=dtype)
    cols, chunks = split(codes, rows)
    launch(
        "restore",
        rows * chunks,
        (codes, scale, None if from_zero else zero_point),
        (values,),
        (cols, chunks),
        {"FROM_ZERO": from_zero, "RUNS": RUNS},
    )
    return values


def constants_of(grid: DeviceGrid) -> dict[str, int]:
    """What a kernel is compiled for, for a grid."""
    return {"RULE": int(grid.rule), "QMIN": grid.grid.qmin, "QMAX": grid.grid.qmax}


def dense(x: Tensor) -> Tensor:
    """The tensor itself where it fills its memory without overlap, in any order; else a copy."""
    return x if fills_its_memory(x) else x.contiguous()


def split(x: Tensor, rows: int) -> tuple[int, int]:
    """The values of a row, and the programs that share them."""
    cols = x.numel() // max(rows, 1)
    return cols, -(-cols // (RUNS * RUN))
