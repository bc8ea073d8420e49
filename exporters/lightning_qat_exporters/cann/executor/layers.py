"""Convolutions, matrix products and batch norm of the reference executor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from lightning_qat_exporters.cann.executor.domain import (
    _EXACT_IN_FLOAT32,
    _INT32,
    DOMAIN,
    Array,
    NodeRefused,
    require_room,
)
from lightning_qat_exporters.cann.executor.windows import filled_attribute, pads_of, with_padding
from lightning_qat_exporters.cann.int4_packing import unpacked

# Memory for the unfolded windows of one block of images.
_BLOCK_BYTES = 2**26


class Conv(OpRun):
    """A convolution of 1 to 3 dimensions, exact on integers, float32 on real values."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        if group == 1:
            weight = unpacked(weight, 1, x.shape[1])
        if x.shape[1] != weight.shape[1] * group:
            raise NodeRefused(
                f"{label!r} has {x.shape[1]} input channels and a weight for "
                f"{weight.shape[1] * group}."
            )
        kernel = weight.shape[2:]
        strides, dilations = filled_attribute(strides, kernel), filled_attribute(dilations, kernel)
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=0)
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        begin, end = pads_of(auto_pad, pads, x.shape[2:], spans, strides)
        result = _correlate(with_padding(data, begin, end), weight, strides, dilations, group)
        return (_accumulated(result, added, x.dtype, offset, label, axis=1),)


class ConvTranspose(OpRun):
    """A transposed convolution: spread the data over the strides, correlate with the flip."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        if auto_pad != "NOTSET" or output_shape is not None:
            raise NodeRefused(
                f"{label!r} must give its padding by 'pads' and 'output_padding'; got auto_pad "
                f"{auto_pad!r} and output_shape {output_shape!r}."
            )
        weight = unpacked(weight, 0, x.shape[1])
        kernel = weight.shape[2:]
        rank = len(kernel)
        strides, dilations = filled_attribute(strides, kernel), filled_attribute(dilations, kernel)
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=1)
        apart = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)]
        require_room("the spread data", (*data.shape[:2], *apart), data.itemsize)
        spread = np.zeros((*data.shape[:2], *apart), data.dtype)
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = data
        reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = pads or [0] * 2 * rank
        extra = output_padding or [0] * rank
        begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
        end = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
        # [Cin, Cout/g, k] with Cin in groups -> [Cout, Cin/g, k], flipped
        grouped = weight.reshape(group, -1, *weight.shape[1:]).swapaxes(1, 2)
        flipped = np.flip(grouped, tuple(range(3, 3 + rank)))
        kernels = flipped.reshape(-1, *flipped.shape[2:])
        ones = [1] * rank
        result = _correlate(with_padding(spread, begin, end), kernels, ones, dilations, group)
        return (_accumulated(result, added, x.dtype, offset, label, axis=1),)


class Gemm(OpRun):
    """An integer ``x @ weight + bias``; the deploy format has no transposes and no factors."""

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,  # noqa: N803 - the operator's own name
        transB: int = 0,  # noqa: N803
    ) -> tuple[Array]:
        if (alpha, beta, transA) != (1.0, 1.0, 0):
            raise NodeRefused(
                f"An integer Gemm must have alpha = beta = 1 and transA = 0; {label!r} has "
                f"alpha {alpha}, beta {beta}, transA {transA}."
            )
        weight = unpacked(weight.T if transB else weight, 0, x.shape[-1])
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=1)
        return (_accumulated(data @ weight, added, x.dtype, offset, label, axis=-1),)


class MatMul(OpRun):
    """An integer ``x @ weight``."""

    op_domain = DOMAIN

    def _run(self, x: Array, weight: Array, *, label: str, offset: float) -> tuple[Array]:
        weight = unpacked(weight, 0, x.shape[-1])
        data, weight, _ = _operands(x, weight, None, offset, channel_axis=1)
        return (_accumulated(data @ weight, None, x.dtype, offset, label, axis=-1),)


class BatchNormalization(OpRun):
    """A batch norm that no layer could take in, with its own statistics.

    ``onnx.reference`` normalizes with those of the batch in the opsets that deploy files use.
    """

    op_domain = DOMAIN

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        var: Array,
        *,
        label: str,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
    ) -> tuple[Array]:
        if training_mode:
            raise NodeRefused(
                f"{label!r} must normalize with stored statistics; got training_mode."
            )
        shape = (-1, *[1] * (x.ndim - 2))
        factor = gamma / np.sqrt(var + x.dtype.type(epsilon))
        return ((x - mean.reshape(shape)) * factor.reshape(shape) + beta.reshape(shape),)


def _correlate(
    x: Array,
    kernels: Array,
    strides: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> Array:
    """Correlate padded data with kernels ``[Cout, Cin/g, k...]``, a block of images at a time.

    Images are the last axis in memory, of the data that is copied and of the result: runs are long
    however small the images are, and the next layer finds its data in that order.
    """
    kernel = kernels.shape[2:]
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    images = np.moveaxis(x, 0, -1)
    flat = kernels.reshape(group, kernels.shape[0] // group, -1)
    # Every position of the kernel sees the data shifted; [c, k..., out..., n] are all of them.
    seen = (x.shape[1], *kernel, *out)
    require_room("an image's windows", seen, x.itemsize)
    block = max(1, _BLOCK_BYTES // max(1, math.prod(seen) * x.itemsize))
    parts = []
    for first in range(0, max(1, x.shape[0]), block):
        part = images[..., first : first + block]
        columns = np.empty((*seen, part.shape[-1]), x.dtype)
        for at in np.ndindex(*kernel):
            shifted = (
                slice(a * d, a * d + (n - 1) * s + 1, s)
                for a, n, s, d in zip(at, out, strides, dilations, strict=True)
            )
            columns[(slice(None), *at)] = part[(slice(None), *shifted)]
        product = flat @ columns.reshape(group, flat.shape[2], -1)
        parts.append(product.reshape(-1, *out, part.shape[-1]))
    result = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return np.moveaxis(result, -1, 0)


def _operands(
    x: Array, weight: Array, bias: Array | None, offset: float | None, *, channel_axis: int
) -> tuple[Array, Array, Array | None]:
    """Data, weight and bias in one type: real values as they are, integers around zero.

    A sum of integers is exact in floats, in any order, while no partial sum can leave the range in
    which the type holds every integer. That is 2**24 for float32, which is twice as fast, and 2**53
    for float64, which no layer reaches: ``max|q - offset| * sum|w| + |bias|`` bounds them all.
    """
    if offset is None:
        return x, weight, bias
    limits = np.iinfo(x.dtype)
    largest = max(abs(limits.min - offset), abs(limits.max - offset))
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    bound = largest * np.abs(weight, dtype=np.float64).sum(others).max(initial=0)
    if bias is not None:
        bound += np.abs(bias, dtype=np.float64).max(initial=0)
    kind = np.dtype(np.float32 if bound < _EXACT_IN_FLOAT32 else np.float64)
    added = None if bias is None else bias.astype(kind)
    return x.astype(kind) - kind.type(offset), weight.astype(kind), added


def _accumulated(
    result: Array,
    bias: Array | None,
    data_type: np.dtype[Any],
    offset: float | None,
    label: str,
    *,
    axis: int,
) -> Array:
    """Add the bias; make an accumulator integers again.

    The width of a device's accumulator for 16-bit data is not known; it is not bounded here.
    """
    if bias is not None:
        shape = [1] * result.ndim
        shape[axis] = bias.size
        result += bias.reshape(shape)
    if offset is None:
        return result
    if data_type == np.int16:
        return result.astype(np.int64)
    # In float32 it was bounded before.
    wide = result.dtype == np.float64 and result.size
    if wide and (result.min() < _INT32.min or result.max() > _INT32.max):
        raise NodeRefused(
            f"The accumulator of {label!r} must fit int32; it runs from {result.min():.0f} to "
            f"{result.max():.0f}."
        )
    return result.astype(np.int32)
