"""Averages as a depthwise convolution with equal weights, which rounds once to a grid of its own.

LiteRT's AVERAGE_POOL_2D keeps the grid of its input, so that a second rounding would have to follow
it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import IntegerGrid, QParams


def equal_weights(key: str, channels: int, kernel: list[int]) -> QuantizedTensor:
    """The weight: ones, at a scale of one over the size of a window."""
    integers = torch.ones(channels, 1, *kernel, dtype=torch.int8)
    return constant(key, integers, 1 / math.prod(kernel))


def border_factors(
    key: str, size: tuple[int, ...], kernel: list[int], stride: list[int], padding: list[int]
) -> QuantizedTensor:
    """What makes up for padding that was counted: ``1`` inside, more at the border.

    Factors are put on a grid of ``1 / n``, with the smallest ``n`` that holds all of them.
    """
    counted = F.avg_pool2d(torch.ones(1, 1, *size), kernel, stride, padding)
    factors = 1 / counted
    largest = int(127 / float(factors.max()))
    error = [float((factors * n - (factors * n).round()).abs().max()) / n for n in range(1, 128)]
    n = min(range(1, largest + 1), key=lambda n: (round(error[n - 1], 5), n))
    return constant(key, (factors * n).round().to(torch.int8), 1 / n)


def constant(key: str, integers: torch.Tensor, scale: float) -> QuantizedTensor:
    """Integers that were not trained, with one scale."""
    zero_point = torch.tensor(0, dtype=torch.int32)
    qparams = QParams(torch.tensor(scale), zero_point, IntegerGrid(-127, 127))
    return QuantizedTensor(key, "weight", qparams, integers)


def is_same(
    size: tuple[int, ...], kernel: list[int], stride: list[int], padding: list[int]
) -> bool:
    """Whether LiteRT's padding SAME is this padding on both sides."""
    return all(
        max((math.ceil(n / s) - 1) * s + k - n, 0) == 2 * p and (n + 2 * p - k) % s == 0
        for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
    )
