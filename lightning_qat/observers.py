"""How the ranges of successive batches become one range: pure updates of ``(low, high)``."""

from __future__ import annotations

import torch
from torch import Tensor

MOVING_AVERAGE_WEIGHT = 0.01
"""Weight of the newest batch in a settled moving average, as in torch's observers."""


def batch_range(x: Tensor) -> Tensor:
    """The range of one batch as ``(-min, max)``, float32.

    Both entries grow with the range, so the range over several calls, or over the processes of a
    distributed run, is an elementwise maximum of such pairs. NaN becomes infinity, which no maximum
    can lose.

    Args:
        x: Values of any shape and floating dtype, at least one element.

    Returns:
        Shape ``(2,)``.

    Example:
        >>> batch_range(torch.tensor([-1.0, 3.0]))
        tensor([1., 3.])
    """
    low, high = torch.aminmax(x.detach())
    return (
        torch.stack((-low, high))
        .to(torch.float32)
        .nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    )


def moving_average(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Move ``low`` and ``high`` towards the range of one batch, in place.

    ``range += (batch - range) * max(0.01, 1 / (batches + 1))``: a plain mean over the first 100
    batches, so that a short calibration weighs its batches alike, then an exponential average.

    Args:
        low: Lower end so far, scalar.
        high: Upper end so far, scalar.
        batch: ``(-min, max)`` of the batch.
        batches: How many batches ``low`` and ``high`` stand for, scalar.
    """
    weight = torch.clamp(1.0 / (batches + 1.0), min=MOVING_AVERAGE_WEIGHT)
    low.lerp_(-batch[0], weight)
    high.lerp_(batch[1], weight)


def minmax(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Widen ``low`` and ``high`` to the range of one batch, in place; arguments as above.

    The very first batch replaces what stands there.
    """
    first = batches == 0
    low.copy_(torch.where(first, -batch[0], torch.minimum(low, -batch[0])))
    high.copy_(torch.where(first, batch[1], torch.maximum(high, batch[1])))


UPDATES = {"moving_average": moving_average, "minmax": minmax}
"""Calibration name in an ``ActivationSpec`` to its update."""
