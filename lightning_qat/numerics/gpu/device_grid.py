"""Where a kernel finds the scale and the zero point of a grid: in the tensors of the quantizer.

A kernel computes them from the range, or from the learned parameters, in the launch that rounds:
what stands in the quantizer counts, whoever has changed it, and nothing is computed beforehand.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from torch import Tensor

from lightning_qat.numerics.qparams import IntegerGrid


class GridRule(IntEnum):
    """What the two tensors of a grid are; as in ``kernels.py``."""

    GIVEN = 0
    """Scale and zero point themselves."""
    RANGE = 1
    """Lower and upper end of an affine range; see ``affine_qparams``."""
    RANGE_FROM_ZERO = 2
    """Upper end of an affine range that begins at zero, twice."""
    SYMMETRIC_RANGE = 3
    """Lower and upper end of a range of which the farther one counts; see ``symmetric_scale``."""
    SYMMETRIC_CLIP = 4
    """Upper end of a symmetric range, twice."""
    HALF_WIDTH = 5
    """Half the width of a symmetric grid, learned, twice; see ``step_of_half_width``."""
    HALF_WIDTH_FROM_ZERO = 6
    """The same of a grid that begins at zero, twice."""
    HALF_WIDTH_AND_LOW = 7
    """Half the width, and the lower end of the range."""


class DeviceGrid(NamedTuple):
    """A grid as a kernel takes it.

    Args:
        rule: What the two tensors are.
        first: float32: a scalar, or one number per row of the first axis.
        second: Likewise, or one number for all rows.
        grid: The integers in use.
    """

    rule: GridRule
    first: Tensor
    second: Tensor
    grid: IntegerGrid
