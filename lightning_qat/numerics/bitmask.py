"""Masks with one bit per element, for backward."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.numerics.gpu import activations as gpu
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.kernels.build import RUN


def pack_between(x: Tensor, low: float, high: float) -> Tensor:
    """Bits of the elements strictly between two ends; see ``pack_bits``.

    Args:
        x: float32, any shape, without gaps or overlap in memory.
        low: Lower end.
        high: Upper end; infinity: none.

    Example:
        >>> pack_between(torch.tensor([-1.0, 0.0, 1.0, 6.0]), 0.0, 6.0)[:4]
        tensor([0, 0, 1, 0], dtype=torch.uint8)
    """
    bits = kernels.bits_between(x, low, high)
    if bits is not None:
        return bits
    # torch converts signs many times faster than it compares floats.
    inside = x - low if low else x
    inside = torch.minimum(inside, high - x) if high < math.inf else inside
    return pack_bits(inside.sign().clamp_(min=0).to(torch.int8))


def pack_bits(flags: Tensor) -> Tensor:
    """Eight flags to a byte.

    Of every 512 flags in the order of memory, number ``i`` is bit ``i // 64`` of byte ``i % 64``:
    vectors of flags are packed at once, on every device.

    Args:
        flags: int8 or bool, 0 or 1, any shape, without gaps or overlap in memory.

    Returns:
        uint8, ``(64 * ceil(n / 512),)``.

    Example:
        >>> flags = torch.zeros(512, dtype=torch.int8)
        >>> flags[0] = flags[2] = flags[64 + 2] = 1
        >>> pack_bits(flags)[:4]
        tensor([1, 0, 3, 0], dtype=torch.uint8)
    """
    flat = flags.view(torch.uint8).as_strided((flags.numel(),), (1,))
    lanes = F.pad(flat, (0, -len(flat) % RUN)).view(-1, 8, RUN // 8)
    return (lanes << _places(flags)).sum(1, dtype=torch.uint8).flatten()


def unpack_bits(packed: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """The flags of ``pack_bits``, int8, in the shape and strides that they had.

    Example:
        >>> flags = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=torch.int8)
        >>> unpack_bits(pack_bits(flags), flags.shape, flags.stride())
        tensor([[1, 0, 1],
                [0, 0, 0]], dtype=torch.int8)
    """
    lanes = packed.view(-1, 1, RUN // 8) >> _places(packed)
    return (lanes & 1).view(torch.int8).as_strided(shape, stride)


def masked(grad: Tensor, packed: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """A gradient where the flags of ``pack_bits`` are set, zero elsewhere."""
    if not torch.is_grad_enabled():  # Else of a second derivative.
        result = gpu.masked(grad, packed, shape, stride)
        if result is None:
            result = kernels.masked(grad, packed, shape, stride)
        if result is not None:
            return result
    return unpack_bits(packed, shape, stride).to(grad.dtype).mul_(grad)


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device).unsqueeze(1)
