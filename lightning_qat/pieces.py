"""Large tensors piece by piece: what several operations do to a piece stays in the caches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.compiler import is_compiling

PIECE = 2**18
"""Values of a piece per thread: a megabyte of float32, which a core's own caches hold."""

_WORTH_IT = 8
"""From so many pieces on the caches that cores share do not hold the whole either."""


def pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Flat parts of tensors of one shape, or the tensors themselves where that brings nothing.

    Args:
        tensors: In pieces only if they are large, on a CPU, without gaps, and have their elements
            in the same order.

    Example:
        >>> [(len(x), len(y)) for x, y in pieces(torch.zeros(3), torch.zeros(3))]
        [(3, 3)]
    """
    size = PIECE * torch.get_num_threads()
    count = tensors[0].numel()
    if is_compiling() or count < _WORTH_IT * size or not alike(*tensors):
        return (tensors,)
    return zip(*(torch.split(in_order(x), size) for x in tensors), strict=True)


def in_order(x: Tensor) -> Tensor:
    """All elements in the order of memory, of a tensor without gaps."""
    return x.as_strided((x.numel(),), (1,))


def alike(*tensors: Tensor) -> bool:
    """Whether tensors on a CPU have their elements in the same order, without gaps."""
    first = tensors[0]
    if is_compiling() or any(x.stride() != first.stride() for x in tensors):
        return False
    last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    return first.device.type == "cpu" and (last or first.is_contiguous())
