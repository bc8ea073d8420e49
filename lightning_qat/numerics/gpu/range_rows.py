"""Memory that kernels note ranges in, filled for many at once: a fill is a launch of its own."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

ROWS = 64
"""Ranges whose memory is filled at once."""


class _Free(threading.local):
    def __init__(self) -> None:
        self.rows: dict[object, list[Tensor]] = {}


_FREE = _Free()


def fresh_range(device: torch.device) -> Tensor:
    """A ``(-min, max)`` of nothing, float32 ``(2,)``: both are ``-inf``."""
    # Of the stream that fills it; a graph that is captured must fill what it uses.
    key = (device, _stream(device)) if device.type == "cuda" else device
    rows = _FREE.rows.setdefault(key, [])
    if not rows:
        filled = torch.full((ROWS, 2), -torch.inf, dtype=torch.float32, device=device)
        rows.extend(reversed(filled.unbind()))
    return rows.pop()


def drop_fresh_ranges() -> None:
    """Forget what is filled: the next ranges get new memory.

    Called once per step, so that a captured step fills the memory that it uses.
    """
    _FREE.rows.clear()


def _stream(device: torch.device) -> tuple[int, bool]:
    return torch.cuda.current_stream(device).cuda_stream, torch.cuda.is_current_stream_capturing()
