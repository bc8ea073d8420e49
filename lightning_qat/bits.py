"""Flags as single bits: what backward keeps of a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ONES = 0x0101010101010101
_GATHER = 0x0102040810204080
"""A word of eight bytes, each 0 or 1, times this has the bytes as bits of its highest byte."""
_SPREAD = 0x8040201008040201 - 2**64
"""Bit ``i`` of byte ``i``, as a signed integer."""
_CARRY = 0x7F7F7F7F7F7F7F7F


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
    count = flags.numel()
    flat = flags.view(torch.int8).as_strided((count,), (1,))
    if count % 8:
        flat = F.pad(flat, (0, -count % 8))
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
    words = packed.to(torch.int64).mul_(_ONES).bitwise_and_(_SPREAD)
    flat = words.add_(_CARRY).bitwise_right_shift_(7).bitwise_and_(_ONES).view(torch.int8)
    return flat.as_strided(shape, stride)


def masked(grad: Tensor, packed: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A gradient where the flags of ``pack_bits`` are set, zero elsewhere."""
    return unpack_bits(packed, shape, stride).to(grad.dtype).mul_(grad)
