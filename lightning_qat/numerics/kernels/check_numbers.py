"""Look whether compiled loops compute what float32 arithmetic gives, before a model needs them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

_VALUES = 64
_STEP_MIN, _STEP_MAX, _SCALE = -16.0, 30.0, np.float32(0.37)


def check_numbers(library: ctypes.CDLL) -> None:
    """Round some values by ``fake_quantize``, and find the range of others with NaN.

    A compiler may be told, or be made, to divide by multiplying, or to take NaN for impossible.

    Args:
        library: The loops, with their argument types.

    Raises:
        OSError: The results differ from NumPy's.
    """
    # Ten of these ties tell a true division from one by the reciprocal.
    x = (np.arange(_VALUES, dtype=np.float32) - np.float32(20.5)) * _SCALE
    x[-5:] = [np.nan, np.inf, -np.inf, -0.0, 1e-40]
    y, scale, ends = np.empty_like(x), np.array([_SCALE]), np.empty(2, dtype=np.float32)
    everything = (-np.inf, np.inf)
    library.fake_quantize(
        *(1, _VALUES, x.ctypes.data, y.ctypes.data, scale.ctypes.data, _STEP_MIN, _STEP_MAX),
        *(None, 0.0, None, *everything, ends.ctypes.data, *everything, 1),
    )
    expected = np.clip(np.rint(x / _SCALE), _STEP_MIN, _STEP_MAX) * _SCALE
    if not np.array_equal(y, expected, equal_nan=True) or not np.isposinf(ends).all():
        raise OSError(
            "the loops that the C compiler has written compute other numbers than float32 "
            "arithmetic gives, as options such as -ffast-math make them"
        )


@contextmanager
def subnormals_stay() -> Iterator[None]:
    """Undo what a library may do to the thread that loads it: take subnormal numbers for zero.

    GCC before version 13 links code that does so into every library built with ``-ffast-math``.
    """
    before = _has_subnormals()
    try:
        yield
    finally:
        if before and not _has_subnormals():
            torch.set_flush_denormal(False)


def _has_subnormals() -> bool:
    return bool(np.full(1, 1e-40, dtype=np.float32) * np.float32(1.0) != 0.0)
