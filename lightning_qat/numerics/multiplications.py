"""How often a layer multiplies."""

from __future__ import annotations

import math
from collections.abc import Sequence


def multiplications(
    weight: Sequence[int], read: Sequence[int], written: Sequence[int], *, transposed: bool = False
) -> int:
    """Multiplications of one call of a linear layer or a convolution.

    Args:
        weight: Shape of its weight, ``(out, in / groups, ...)``; ``(in, out / groups, ...)`` of a
            transposed convolution.
        read: Shape of its input.
        written: Shape of its output.
        transposed: It is a transposed convolution, which uses a weight for every input.

    Returns:
        Every weight times the places that it is used at.

    Example:
        >>> multiplications((8, 3, 3, 3), (1, 3, 6, 6), (1, 8, 4, 4))  # 27 for each of 128 outputs
        3456
    """
    places = math.prod(read if transposed else written)
    return math.prod(weight) * places // max(1, weight[0] if weight else 1)
