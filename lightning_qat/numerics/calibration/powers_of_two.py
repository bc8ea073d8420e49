"""Values brought near 1 by a power of two, so that their squares and sums stay within float32.

Such a factor changes no digit: a search finds for ``x * 2**k`` what it finds for ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOWEST = torch.finfo(torch.float32).tiny
_HIGHEST = torch.finfo(torch.float32).max


def exponent_of(largest: Tensor) -> Tensor:
    """The least power of two, from -126 to 128, that an absolute value does not exceed.

    0 for what is not finite.

    Example:
        >>> exponent_of(torch.tensor([0.0, 0.75, 3.0, 3.4e38, torch.inf]))
        tensor([-126.,   -0.,    2.,  128.,    0.])
    """
    known = torch.where(torch.isfinite(largest), largest, 1.0)
    return torch.ceil(torch.log2(known.clamp(min=_LOWEST)))


def times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """``x * 2**exponent``, for exponents from -128 to 128: 2**128 is beyond float32.

    What would be beyond it is its largest number.

    Example:
        >>> times_power(torch.tensor(3.4e38), torch.tensor(-128.0))
        tensor(0.9992)
    """
    half = torch.floor(exponent / 2)
    result = x * torch.exp2(half) * torch.exp2(exponent - half)
    return result.clamp(-_HIGHEST, _HIGHEST)
