"""How a tensor lies in memory, as compiled loops and kernels have to know it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.kernels.build import RUN


def fills_its_memory(x: Tensor) -> bool:
    """Whether a tensor has neither gaps nor overlap in memory, in any order of its axes."""
    if x.is_contiguous():
        return True
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    # torch gives a tensor without gaps or overlap its own strides.
    return torch.empty_like(x, device="meta").stride() == x.stride()


def has_rows(x: Tensor) -> bool:
    """Whether a dense tensor has the parts along its first axis one after the other."""
    return x.stride(0) * x.shape[0] == x.numel()


def rows_of(x: Tensor, scale: Tensor) -> int | None:
    """Into how many rows that share a scale a dense tensor falls.

    ``None``: not along its first axis.
    """
    if scale.numel() == 1:
        return 1
    rows = x.shape[0] if x.dim() else 0
    of_first_axis = scale.dim() == x.dim() and scale.numel() == scale.shape[0] == rows
    return rows if of_first_axis and scale.is_contiguous() and has_rows(x) else None


def room_for_bits(x: Tensor) -> Tensor:
    """New memory for a bit per element; see ``pack_bits``."""
    return torch.empty(-(-x.numel() // RUN) * (RUN // 8), dtype=torch.uint8, device=x.device)
