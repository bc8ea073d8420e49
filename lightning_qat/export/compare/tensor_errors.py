"""How far one tensor is from its reference, and how well it fills its grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat.numerics.qparams import QParams

_ON_GRID, _FLOAT32 = 1e-3, 3e-7
"""A difference so close to a whole number of steps is one, and what float32 leaves of the values'
own steps."""


@dataclass(frozen=True)
class TensorErrors:
    """The error of one tensor.

    Args:
        sqnr_db: Signal to quantization noise ratio in decibels: ``10 log10(sum(r^2) / sum((r -
            v)^2))``; infinite where nothing differs.
        mse: Mean squared error.
        cosine: Cosine of the angle between the two; 1 where nothing differs.
        max_steps: Largest difference in steps of the reference's grid.
        mean_steps: Mean difference in steps.
        fraction_differing: Share of elements more than half a step away.
        fraction_off_grid: Share of elements whose difference is no whole number of steps: they lie
            on another grid.
    """

    sqnr_db: float
    mse: float
    cosine: float
    max_steps: float
    mean_steps: float
    fraction_differing: float
    fraction_off_grid: float


def tensor_errors(reference: Array, values: Array, step: float) -> TensorErrors:
    """The error of values, in float64.

    Args:
        reference: What they should be.
        values: The same shape.
        step: The unit of the ``_steps`` figures; 0: differences are counted as they are.

    Example:
        >>> errors = tensor_errors(np.array([3.0, 4.0]), np.array([3.0, 4.5]), step=0.25)
        >>> errors.max_steps, errors.fraction_differing, errors.sqnr_db
        (2.0, 0.5, 20.0)
    """
    exact, found = (array.astype(np.float64).reshape(-1) for array in (reference, values))
    noise = found - exact
    steps = np.abs(noise) / step if step > 0 else np.abs(noise)
    signal_power, noise_power = float(exact @ exact), float(noise @ noise)
    norms = float(np.sqrt(signal_power * float(found @ found)))
    sqnr = 10 * np.log10(signal_power / noise_power) if noise_power and signal_power else np.inf
    if noise_power and not signal_power:
        sqnr = -np.inf
    size = max(exact.size, 1)
    near = _ON_GRID + _FLOAT32 * (np.abs(exact) / step if step > 0 else np.abs(exact))
    off_grid = np.abs(steps - np.rint(steps)) > near
    return TensorErrors(
        sqnr_db=float(sqnr),
        mse=noise_power / size,
        cosine=float(exact @ found) / norms if norms else float(signal_power == noise_power),
        max_steps=float(steps.max(initial=0.0)),
        mean_steps=float(steps.sum()) / size,
        fraction_differing=float(np.count_nonzero(steps > 0.5)) / size,
        fraction_off_grid=float(np.count_nonzero(off_grid)) / size,
    )


@dataclass(frozen=True)
class GridUse:
    """How a tensor fills its integer grid.

    Args:
        clipped: Share of elements that lie outside the range, and are moved by more than half a
            step.
        unused: Share of the grid's integers that lie below the smallest or above the largest one
            used.
        dead_channels: Channels (axis 1, of more than one sample) whose every integer is the zero
            point although their real values are not all zero.
    """

    clipped: float
    unused: float
    dead_channels: int


def grid_use(real: Array, qparams: QParams) -> GridUse:
    """How real values fill a grid, per tensor.

    Args:
        real: Before quantization, any shape.
        qparams: One scale and zero point.

    Example:
        >>> import torch
        >>> from lightning_qat.numerics.qparams import IntegerGrid
        >>> q = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), IntegerGrid(-8, 7))
        >>> use = grid_use(np.array([0.0, 3.0, 9.0, -2.0], np.float32), q)
        >>> use.clipped, use.unused
        (0.25, 0.375)
    """
    grid, zero_point = qparams.grid, int(qparams.zero_point)
    levels = np.rint(real.astype(np.float64) / float(qparams.scale)) + zero_point
    integers = np.clip(levels, grid.qmin, grid.qmax)
    if not integers.size:
        return GridUse(0.0, 1.0, 0)
    used = int(integers.max()) - int(integers.min()) + 1
    dead = 0
    if real.ndim > 1:
        axes = tuple(axis for axis in range(real.ndim) if axis != 1)
        silent = np.all(integers == zero_point, axis=axes)
        dead = int(np.count_nonzero(silent & np.any(real != 0, axis=axes)))
    return GridUse(
        clipped=float(np.mean(levels != integers)),
        unused=1 - used / (grid.qmax - grid.qmin + 1),
        dead_channels=dead,
    )
