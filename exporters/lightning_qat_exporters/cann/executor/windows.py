"""Padding and sliding windows in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lightning_qat_exporters.cann.executor.domain import Array, require_room


def filled_attribute(values: Sequence[int] | None, kernel: Sequence[int]) -> list[int]:
    """Strides or dilations, 1 for each axis where the node has none."""
    return [1] * len(kernel) if values is None else list(values)


def pads_of(
    auto_pad: str,
    pads: Sequence[int] | None,
    size: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Padding before and after each axis, by ONNX's rules for ``auto_pad``."""
    rank = len(size)
    if auto_pad == "NOTSET":
        pads = pads or [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    total = [
        max(0, (math.ceil(n / s) - 1) * s + span - n)
        for n, span, s in zip(size, spans, strides, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def with_padding(x: Array, begin: Sequence[int], end: Sequence[int], fill: float = 0) -> Array:
    """Pad the spatial axes; a negative amount cuts."""
    ends = tuple(zip(begin, end, strict=True))
    cuts = (slice(max(-b, 0), -e if e < 0 else None) for b, e in ends)
    x = x[(slice(None), slice(None), *cuts)]
    widths = [(max(b, 0), max(e, 0)) for b, e in ends]
    if not any(b or e for b, e in widths):
        return x
    sizes = x.shape[2:]
    around = [b + size + e for size, (b, e) in zip(sizes, widths, strict=True)]
    require_room("the padded data", (x.shape[0], x.shape[1], *around), x.itemsize)
    # Images last in memory, as in ``_correlate``.
    padded = np.moveaxis(np.full((x.shape[1], *around, x.shape[0]), fill, x.dtype), -1, 0)
    inside = (slice(b, b + size) for size, (b, _) in zip(sizes, widths, strict=True))
    padded[(slice(None), slice(None), *inside)] = x
    return padded


def windows_of(
    x: Array, spans: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    """All windows of padded data, as ``[N, C, out..., kernel...]``; a view."""
    axes = tuple(range(2, x.ndim))
    sizes = [
        *((n - span) // s + 1 for n, span, s in zip(x.shape[2:], spans, strides, strict=True)),
        *((span - 1) // d + 1 for span, d in zip(spans, dilations, strict=True)),
    ]
    # A view, but all of it is read.
    require_room("all windows", (*x.shape[:2], *sizes), 1)
    view: Array = sliding_window_view(x, tuple(spans), axes)
    steps = (slice(None, None, s) for s in (*strides, *dilations))
    return view[(slice(None), slice(None), *steps)]
