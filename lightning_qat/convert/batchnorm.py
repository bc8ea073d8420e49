"""Fold a batch norm that follows a layer into the layer's integers, scale and bias. Pure.

``y = gamma * (w.x + b - mean) / sqrt(var + eps) + beta`` is a layer with weight ``f * w`` and bias
``f * (b - mean) + beta``, where ``f = gamma / sqrt(var + eps)`` per output channel. For a
symmetric weight ``w = scale * q`` that is the scale times ``|f|`` and the integers times
``sign(f)``: the same function to the last integer, so training needs no folded layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_qat.numerics.arithmetic import MIN_SCALE, accumulator_scale, along_channels
from lightning_qat.numerics.qparams import IntegerGrid, QParams


@dataclass(frozen=True)
class BatchNormStatistics:
    """What an evaluating batch norm computes with; every tensor has shape ``(channels,)``."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor
    var: Tensor
    eps: float

    @property
    def factor(self) -> Tensor:
        """``gamma * (1 / sqrt(var + eps))`` in float32.

        In this order and with every step correctly rounded, so that folded scales equal those of
        AMCT's files. torch's own float32 square root is off by a bit on some processors, hence the
        detour through float64.
        """
        root = torch.sqrt((self.var + self.eps).double()).float()
        reciprocal = (1.0 / root.double()).float()
        return reciprocal if self.gamma is None else self.gamma * reciprocal

    def fold_bias(self, bias: Tensor | None) -> Tensor:
        """The bias of the folded layer, ``f * (b - mean) + beta``, float32."""
        shifted = -self.mean if bias is None else bias - self.mean
        folded = self.factor * shifted
        return folded if self.beta is None else folded + self.beta

    def fold_weight(self, weight: Tensor, axis: int) -> Tensor:
        """A float weight times the factor of its output channel."""
        return weight * along_channels(self.factor, weight.shape, axis)

    def fold_integers(
        self, integers: Tensor, qparams: QParams, axis: int
    ) -> tuple[Tensor, QParams, int]:
        """Fold into a symmetric integer weight.

        A per-tensor scale becomes one scale per channel: the channels' factors differ. A grid with
        one more negative integer (-8..7) is mirrored to -8..8 where a negative factor needs it, so
        that nothing is lost. Only where eight bits are full (-128..127, AMCT's grid) does the
        integer 128 saturate to 127, as in AMCT.

        Args:
            integers: The weight's integers.
            qparams: Its scale (zero point 0).
            axis: The output channel's axis of the weight.

        Returns:
            Integers and parameters of the folded weight, and how many integers saturated.
        """
        factor = self.factor
        own = accumulator_scale(torch.ones(()), qparams.scale, factor.numel())
        scale = own * factor.abs()
        # A channel switched off by gamma (zero, or too small for a normal float32 scale) keeps a
        # usable scale and loses its integers.
        off = scale < MIN_SCALE
        sign = torch.where(off, torch.zeros_like(factor), factor.sign())
        # torch.sign of an int8 product would overflow on -128: widen first.
        signed = integers.to(torch.int32) * along_channels(sign, integers.shape, axis).to(
            torch.int32
        )
        grid = qparams.grid
        highest = int(signed.max()) if signed.numel() else grid.qmax
        saturated = 0
        if highest > grid.qmax:
            limit = 127 if grid.dtype is torch.int8 else 32767
            saturated = int((signed > limit).sum())
            grid = IntegerGrid(grid.qmin, min(-grid.qmin, limit))
        scale = torch.where(off, own, scale)
        folded = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), grid, axis)
        return signed.clamp(max=grid.qmax).to(grid.dtype), folded, saturated
