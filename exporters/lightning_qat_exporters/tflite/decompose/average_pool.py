"""Decompose average pools to a depthwise convolution with equal weights, which rounds once.

LiteRT's AVERAGE_POOL_2D has one scale for input and output, so a pool with a scale of its own would
be rounded twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import IntegerGrid, QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of, per_axis
from lightning_qat_exporters.tflite.decompose.builder import Builder, V


@dataclass(frozen=True)
class Pool:
    """An average pool over height and width.

    Args:
        kernel: Height and width of a window.
        stride: Distance of windows, per axis.
        padding: Zeros on both sides, per axis.
        counts_padding: Padding is part of the average.
    """

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    counts_padding: bool

    def is_same(self, size: tuple[int, ...]) -> bool:
        """Whether LiteRT's padding SAME is this padding on both sides.

        Args:
            size: Height and width of the input.
        """
        return all(
            max((math.ceil(n / s) - 1) * s + k - n, 0) == 2 * p and (n + 2 * p - k) % s == 0
            for n, k, s, p in zip(size, self.kernel, self.stride, self.padding, strict=True)
        )


def avg_pool2d(node: fx.Node) -> Pool:
    """Read an ``aten.avg_pool2d``.

    Raises:
        CannotExpress: It has options that LiteRT's pools and convolutions lack.
    """
    _, kernel, stride, padding, ceil, counts, divisor = arguments_of(node)
    if ceil or divisor is not None:
        raise CannotExpress("avg_pool2d with ceil_mode or divisor_override has no form")
    kernel, padding = per_axis(kernel, 2), per_axis(padding, 2)
    counts = bool(counts) or not any(padding)
    return Pool(kernel, per_axis(stride or kernel, 2), padding, counts)


def avg_pool1d(node: fx.Node) -> Pool:
    """Read an ``aten.avg_pool1d`` as a pool of a picture of height 1.

    Raises:
        CannotExpress: As ``avg_pool2d``.
    """
    _, kernel, stride, padding, ceil, counts = arguments_of(node)
    if ceil:
        raise CannotExpress("avg_pool1d with ceil_mode has no form")
    size, step, edge = (per_axis(option, 1) for option in (kernel, stride or kernel, padding))
    return Pool([1, *size], [1, *step], [0, *edge], bool(counts) or not any(edge))


def adaptive_avg_pool2d(before: tuple[int, ...], after: tuple[int, ...]) -> Pool:
    """An ``aten.adaptive_avg_pool2d`` between two sizes, height and width each.

    Raises:
        CannotExpress: Windows are of unequal size.
    """
    kernel = [b // a for b, a in zip(before, after, strict=True)]
    if any(b % a for b, a in zip(before, after, strict=True)):
        raise CannotExpress(f"windows of unequal size: {tuple(before)} to {list(after)}")
    return Pool(kernel, kernel, [0, 0], counts_padding=True)


def average_pool(
    build: Builder[V], x: V, name: str, pool: Pool, shape: tuple[int, ...], output: QParams
) -> V:
    """Add the operators of an average pool.

    Args:
        build: The backend's graph.
        x: A quantized picture.
        name: Prefix of the constants' keys.
        pool: The pool.
        shape: Shape of ``x``: channels, height and width are last.
        output: Scale and zero point of the result.
    """
    weight = _equal_weights(f"{name}.weight", shape[-3], pool.kernel)
    mean = build.depthwise(x, weight, pool.stride, pool.padding, output)
    if pool.counts_padding:
        return mean
    return build.binary(
        "mul", mean, build.constant(_border_factors(f"{name}.border", shape[-2:], pool)), output
    )


def constant(key: str, integers: torch.Tensor, scale: float) -> QuantizedTensor:
    """Integers that were not trained, with one scale."""
    zero_point = torch.tensor(0, dtype=torch.int32)
    qparams = QParams(torch.tensor(scale), zero_point, IntegerGrid(-127, 127))
    return QuantizedTensor(key, "weight", qparams, integers)


def _equal_weights(key: str, channels: int, kernel: list[int]) -> QuantizedTensor:
    """Ones, at a scale of one over the size of a window."""
    integers = torch.ones(channels, 1, *kernel, dtype=torch.int8)
    return constant(key, integers, 1 / math.prod(kernel))


def _border_factors(key: str, size: tuple[int, ...], pool: Pool) -> QuantizedTensor:
    """Factors that undo the counting of padding: 1 inside, more at the border.

    Their scale is ``1 / n``, with the smallest ``n`` that holds all of them.
    """
    counted = F.avg_pool2d(torch.ones(1, 1, *size), pool.kernel, pool.stride, pool.padding)
    factors = 1 / counted
    largest = int(127 / float(factors.max()))
    error = [float((factors * n - (factors * n).round()).abs().max()) / n for n in range(1, 128)]
    n = min(range(1, largest + 1), key=lambda n: (round(error[n - 1], 5), n))
    return constant(key, (factors * n).round().to(torch.int8), 1 / n)
