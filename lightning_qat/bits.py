"""Flags as single bits: what backward keeps of a mask."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.pieces import in_order

_ONES = 0x0101010101010101
_GATHER = 0x0102040810204080
"""A word of eight bytes, each 0 or 1, times this has the bytes as bits of its highest byte."""
_SPREAD = 0x8040201008040201 - 2**64
"""Bit ``i`` of byte ``i``, as a signed integer."""
_CARRY = 0x7F7F7F7F7F7F7F7F


_FEW_THREADS = 4
"""Up to so many threads of torch NumPy is faster, whose one thread is vectorised throughout."""


def _by_numpy(x: Tensor) -> bool:
    return x.device.type == "cpu" and not is_compiling() and torch.get_num_threads() <= _FEW_THREADS


def between(x: Tensor, low: float, high: float) -> Tensor:
    """Flags of the elements strictly between two ends.

    Args:
        x: float32, any shape, without gaps or overlap in memory.
        low: Lower end.
        high: Upper end; infinity: none.

    Example:
        >>> between(torch.tensor([-1.0, 0.0, 1.0, 6.0]), 0.0, 6.0)
        tensor([0, 0, 1, 0], dtype=torch.int8)
    """
    bounded = high < math.inf
    if _by_numpy(x) and x.dtype == torch.float32:
        values = in_order(x.detach()).numpy()
        flags = np.greater(values, low)
        if bounded:
            flags &= np.less(values, high)
        return torch.from_numpy(flags).view(torch.int8).as_strided(x.shape, x.stride())
    # torch converts signs many times faster than it compares floats.
    inside = x - low if low else x
    inside = inside * (high - x) if bounded else inside
    return inside.sign().clamp_(min=0).to(torch.int8)


def pack_bits(flags: Tensor) -> Tensor:
    """Eight flags to a byte, in the order of memory.

    Args:
        flags: int8 or bool, 0 or 1, any shape, without gaps or overlap in memory.

    Returns:
        uint8, ``(ceil(n / 8),)``.

    Example:
        >>> pack_bits(torch.tensor([1, 0, 1, 0, 0, 0, 0, 1, 1], dtype=torch.int8))
        tensor([133,   1], dtype=torch.uint8)
    """
    flat = in_order(flags.view(torch.int8))
    if _by_numpy(flags):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    if len(flat) % 8:
        flat = F.pad(flat, (0, -len(flat) % 8))
    # Words of eight bytes: an eighth of the work, vectorised, on every device.
    return (flat.view(torch.int64) * _GATHER).bitwise_right_shift_(56).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The flags of ``pack_bits``, int8, in the shape and strides that they had.

    Example:
        >>> unpack_bits(torch.tensor([133, 1], dtype=torch.uint8), torch.Size((3, 3)), (3, 1))
        tensor([[1, 0, 1],
                [0, 0, 0],
                [0, 1, 1]], dtype=torch.int8)
    """
    if _by_numpy(packed):
        flags = np.unpackbits(packed.numpy(), bitorder="little")
        return torch.from_numpy(flags).view(torch.int8).as_strided(shape, stride)
    words = packed.to(torch.int64).mul_(_ONES).bitwise_and_(_SPREAD)
    flat = words.add_(_CARRY).bitwise_right_shift_(7).bitwise_and_(_ONES).view(torch.int8)
    return flat.as_strided(shape, stride)


def masked(grad: Tensor, packed: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A gradient where the flags of ``pack_bits`` are set, zero elsewhere."""
    return unpack_bits(packed, shape, stride).to(grad.dtype).mul_(grad)
