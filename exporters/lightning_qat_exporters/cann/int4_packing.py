"""Weights of 4 bits, two to a byte, as AMCT stores them for Ascend.

Nothing in a deploy file marks them: a layer whose weight has half as many input channels as its
data holds packed ones, and the record says ``wts_type: "INT4"``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

INPUT_AXIS = {"Conv": 1, "ConvTranspose": 0, "Gemm": 0, "MatMul": 0}
"""The input channel's axis of a weight in a deploy file, by operator."""

RNN_INPUT_AXIS = 2
"""That of both weights of a recurrent node, ``[1, gates * hidden, inputs]``. AMCT packs both or
none (``pack_int4_weight_pass.py``, ``check_int4_cin_pack_supported``)."""


def can_pack(channels: int, groups: int) -> bool:
    """Whether a weight has a packed form: an even number of input channels, in one group."""
    return channels % 2 == 0 and groups == 1


def pack(integers: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    """Two neighbours along ``axis`` in one byte, the first in the low half.

    Example:
        >>> pack(np.array([1, -1, -8, 7], np.int8), axis=0).view(np.uint8)
        array([241, 120], dtype=uint8)
    """
    nibbles = np.moveaxis(integers, axis, 0).view(np.uint8) & 0xF
    return np.moveaxis(nibbles[0::2] | nibbles[1::2] << 4, 0, axis).view(np.int8)


def unpack(packed: NDArray[np.int8], axis: int) -> NDArray[np.int8]:
    """What ``pack`` put together.

    Example:
        >>> unpack(np.array([-15, 120], np.int8), axis=0)
        array([ 1, -1, -8,  7], dtype=int8)
    """
    # Shifted to the top and back, a nibble's sign fills the byte.
    halves = np.stack((packed << 4 >> 4, packed >> 4), axis=axis + 1)
    shape = [*packed.shape]
    shape[axis] *= 2
    return halves.reshape(shape)


def unpacked(weight: NDArray[np.int8], axis: int, channels: int) -> NDArray[np.int8]:
    """A weight of so many input channels, whether it is stored packed or not."""
    return unpack(weight, axis) if 2 * weight.shape[axis] == channels else weight
