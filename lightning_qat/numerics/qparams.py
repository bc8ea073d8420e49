"""Integer grids, and the scale and zero point that place them on the real line.

``real = scale * (integer - zero_point)`` is the one sign convention of this project.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IntegerGrid:
    """The integers a tensor may take: ``qmin .. qmax``, both inclusive.

    ==============================  ============  =============
    grid                            8 bits        4 bits
    ==============================  ============  =============
    ``IntegerGrid.activation(bits)``       -128 .. 127   -8 .. 7
    ``IntegerGrid.weight(bits)``           -127 .. 127   -8 .. 7
    ``IntegerGrid.signed(bits)``           -128 .. 127   -8 .. 7
    ==============================  ============  =============

    Weights of 8 and more bits give up the lowest integer, so that a negative batch-norm factor can
    be folded by negating integers, and because every integer target accepts that range. At fewer
    bits a lost level costs accuracy, so the full range is kept.
    """

    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        if self.qmin >= self.qmax:
            raise ValueError(f"qmin must be below qmax; got qmin={self.qmin}, qmax={self.qmax}.")

    @classmethod
    def signed(cls, bits: int) -> IntegerGrid:
        """Every two's-complement integer of ``bits`` bits."""
        return cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @classmethod
    def activation(cls, bits: int) -> IntegerGrid:
        """The grid of an activation."""
        return cls.signed(bits)

    @classmethod
    def weight(cls, bits: int) -> IntegerGrid:
        """The grid of a symmetric weight.

        Example:
            >>> IntegerGrid.weight(8), IntegerGrid.weight(4)
            (IntegerGrid(qmin=-127, qmax=127), IntegerGrid(qmin=-8, qmax=7))
        """
        full = cls.signed(bits)
        return cls(-full.qmax, full.qmax) if bits >= 8 else full

    @property
    def half_count(self) -> int:
        """Half the number of integers of its bits, a power of two: 128 also of -127 .. 127."""
        return (self.qmax - self.qmin + 2) // 2

    @property
    def symmetric(self) -> IntegerGrid:
        """The grid whose ends the largest absolute value touches: -127 .. 127 of -128 .. 127."""
        return IntegerGrid(-self.qmax, self.qmax)

    @property
    def dtype(self) -> torch.dtype:
        """The smallest signed torch dtype that holds the grid."""
        return torch.int8 if self.qmin >= -128 and self.qmax <= 127 else torch.int16


@dataclass(frozen=True, eq=False)
class QParams:
    """Where a grid lies on the real line: ``real = scale * (integer - zero_point)``.

    Args:
        scale: Real size of one integer step, float32, positive and finite. A scalar per tensor,
            ``(channels,)`` per channel.
        zero_point: Integer that stands for real zero, int32, the shape of ``scale``.
        grid: The integers in use.
        axis: The channel axis of the tensor, ``None`` per tensor.

    Raises:
        ValueError: A scale is not positive or not finite, a zero point is outside the grid, or the
            shapes do not fit ``axis``.
    """

    scale: Tensor
    zero_point: Tensor
    grid: IntegerGrid
    axis: int | None = None

    def __post_init__(self) -> None:
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise ValueError(
                "scale must be float32 and zero_point int32; "
                f"got {self.scale.dtype} and {self.zero_point.dtype}."
            )
        wanted = 0 if self.axis is None else 1
        if self.scale.dim() != wanted or self.zero_point.shape != self.scale.shape:
            raise ValueError(
                f"scale and zero_point must have {wanted} dimension(s) for axis={self.axis}; got "
                f"shapes {tuple(self.scale.shape)} and {tuple(self.zero_point.shape)}."
            )
        if not bool(((self.scale > 0) & torch.isfinite(self.scale)).all()):
            raise ValueError(f"scale must be positive and finite; got {self.scale.tolist()}.")
        low, high = int(self.zero_point.min()), int(self.zero_point.max())
        if low < self.grid.qmin or high > self.grid.qmax:
            raise ValueError(f"zero_point must lie in {self.grid}; got {low} .. {high}.")

    def equal(self, other: QParams) -> bool:
        """Whether both are the same to the bit."""
        return (
            self.grid == other.grid
            and self.axis == other.axis
            and torch.equal(self.scale, other.scale)
            and torch.equal(self.zero_point, other.zero_point)
        )
