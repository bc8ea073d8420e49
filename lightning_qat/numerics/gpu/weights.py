"""All weights of a model on a GPU: three launches, whatever their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_qat.numerics.gpu.launch import launch
from lightning_qat.numerics.memory_layout import fills_its_memory, has_rows
from lightning_qat.numerics.qparams import IntegerGrid

BLOCK = 1024
"""The most values of a piece."""

_ALIGNED = 16
"""Results begin at multiples of so many elements, for whole vectors to be stored."""


class Channels(NamedTuple):
    """Which values of a weight share a scale.

    Args:
        axis: The output channels' axis; ``None``: all values share one.
        groups: Of a transposed convolution, whose groups have channels of their own.
    """

    axis: int | None
    groups: int = 1


class PieceTable:
    """Weights cut into pieces whose values share a scale; see ``weight_kernels.py``.

    It holds addresses: it is good for as long as the weights stay where they are.

    Args:
        weights: Weights of one dtype on one device, each without gaps in memory; see ``fits``.
        channels: Their channels.

    Attributes:
        table: The pieces, int64 ``(pieces, 4)``.
        offsets: Where the result of each weight begins.
        size: Elements of all results.
        scales: How many scales each weight has.
    """

    def __init__(self, weights: Sequence[Tensor], channels: Sequence[Channels]) -> None:
        self.weights = tuple(weights)
        self.offsets: list[int] = []
        self.scales: list[int] = []
        self.size, pieces = 0, []
        for weight, of in zip(weights, channels, strict=True):
            first, count, channel = _pieces(tuple(weight.shape), of)
            self.offsets.append(self.size)
            pieces.append(
                np.stack(
                    [
                        weight.data_ptr() + first * weight.element_size(),
                        self.size + first,
                        count,
                        sum(self.scales) + channel,
                    ],
                    axis=1,
                )
            )
            self.scales.append(int(channel.max()) + 1 if len(channel) else 0)
            self.size += -(-weight.numel() // _ALIGNED) * _ALIGNED
        table = torch.from_numpy(np.concatenate(pieces).astype(np.int64))
        self.table = table.to(self.weights[0].device)


class QuantizedWeight(NamedTuple):
    """A weight on its grid.

    Args:
        values: Of the shape, strides and dtype of the weight.
        codes: Its integers, int8, if they are wanted.
        scale: float32, one per channel.
    """

    values: Tensor
    codes: Tensor | None
    scale: Tensor


def fits(weight: Tensor, channels: Channels) -> bool:
    """Whether a weight can be cut into pieces where it lies."""
    if not weight.numel():
        return False
    if channels.axis in (None, 0):
        return fills_its_memory(weight) and (channels.axis is None or has_rows(weight))
    return channels.axis == 1 and weight.is_contiguous()


def quantize_weights(
    table: PieceTable, grid: IntegerGrid, *, arq: bool, keeps_codes: bool
) -> list[QuantizedWeight]:
    """Quantize weights by their own ranges, each channel by itself.

    Args:
        table: The weights.
        grid: The integers in use.
        arq: The scale is ``arq_scale``, else ``symmetric_scale``.
        keeps_codes: Integers are wanted.
    """
    like, total = table.weights[0], sum(table.scales)
    ranges = torch.full((total, 2), -torch.inf, dtype=torch.float32, device=like.device)
    pieces = len(table.table)
    launch(
        "weight_ranges",
        pieces,
        (table.table, like),
        (ranges,),
        (),
        {"BLOCK": BLOCK},
        by_address=table.weights[1:],
    )
    values = torch.empty(table.size, dtype=like.dtype, device=like.device)
    codes = torch.empty_like(values, dtype=torch.int8) if keeps_codes else None
    scales = torch.empty(total, dtype=torch.float32, device=like.device)
    launch(
        "quantize_weights",
        pieces,
        (table.table, like, ranges),
        (values, codes, scales),
        (),
        {
            "QMIN": grid.qmin,
            "QMAX": grid.qmax,
            "ARQ": arq,
            "CODES": keeps_codes,
            "BLOCK": BLOCK,
        },
        by_address=table.weights[1:],
    )
    return [
        QuantizedWeight(
            _laid_out(values, weight, offset),
            None if codes is None else _laid_out(codes, weight, offset),
            scale,
        )
        for weight, offset, scale in zip(
            table.weights, table.offsets, torch.split(scales, table.scales), strict=True
        )
    ]


def _laid_out(flat: Tensor, like: Tensor, offset: int) -> Tensor:
    return flat.as_strided(like.shape, like.stride(), offset)


def _pieces(
    shape: tuple[int, ...], channels: Channels
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First value, number of values and channel of each piece, int64."""
    if channels.axis is None:
        length, of_run = int(np.prod(shape)), np.zeros(1, dtype=np.int64)
    elif channels.axis == 0:
        length, of_run = int(np.prod(shape[1:])), np.arange(shape[0])
    else:
        length, (inputs, outputs) = int(np.prod(shape[2:])), shape[:2]
        group = np.arange(inputs) // (inputs // channels.groups)
        of_run = (group[:, None] * outputs + np.arange(outputs)).reshape(-1)
    starts = np.arange(0, length, BLOCK)
    first = (np.arange(len(of_run))[:, None] * length + starts).reshape(-1)
    count = np.tile(np.minimum(BLOCK, length - starts), len(of_run))
    return first, count, np.repeat(of_run, len(starts))
