"""Max and average pools of the reference executor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx.reference.op_run import OpRun

from lightning_qat_exporters.cann.executor.domain import DOMAIN, Array
from lightning_qat_exporters.cann.executor.windows import (
    filled_attribute,
    pads_of,
    windows_of,
    with_padding,
)


class MaxPool(OpRun):
    """The largest value of every window; no indices."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        kernel_shape: Sequence[int],
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        storage_order: int = 0,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        lowest = -np.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
        pool = _Pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        return (pool.windows(x, fill=lowest).max(axis=pool.axes),)


class AveragePool(OpRun):
    """The mean of every window, over its real elements or with the padding."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        kernel_shape: Sequence[int],
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        pool = _Pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
        if count_include_pad:
            ones = with_padding(ones, pool.begin, pool.end, 1)
            counted = pool.windows(ones, padded=True)
        else:
            counted = pool.windows(ones)
        total = pool.windows(x).sum(axis=pool.axes, dtype=x.dtype)
        return ((total / counted.sum(axis=pool.axes)).astype(x.dtype),)


class _Pool:
    """The windows of a pool; the last one may stick out where ``ceil_mode`` allows it."""

    def __init__(
        self,
        x: Array,
        kernel: Sequence[int],
        auto_pad: str,
        ceil_mode: int,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        strides: Sequence[int] | None,
    ) -> None:
        self._dilations = filled_attribute(dilations, kernel)
        self._strides = filled_attribute(strides, kernel)
        self._spans = [d * (k - 1) + 1 for k, d in zip(kernel, self._dilations, strict=True)]
        size = x.shape[2:]
        self.begin, self.end = pads_of(auto_pad, pads, size, self._spans, self._strides)
        self.axes = tuple(range(-len(kernel), 0))
        self._overhang = [0] * len(kernel)
        if ceil_mode:
            for axis, stride in enumerate(self._strides):
                padded = size[axis] + self.begin[axis] + self.end[axis]
                steps = math.ceil((padded - self._spans[axis]) / stride)
                # A window must start inside the data or the padding before it.
                if steps * stride >= size[axis] + self.begin[axis]:
                    steps -= 1
                self._overhang[axis] = max(0, steps * stride + self._spans[axis] - padded)

    def windows(self, x: Array, *, fill: float = 0, padded: bool = False) -> Array:
        """``x`` as ``[N, C, out..., kernel...]``."""
        begin = [0] * len(self.begin) if padded else self.begin
        end = [0] * len(self.end) if padded else self.end
        end = [e + o for e, o in zip(end, self._overhang, strict=True)]
        x = with_padding(x, begin, end, fill)
        return windows_of(x, self._spans, self._strides, self._dilations)
