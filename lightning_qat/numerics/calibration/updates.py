"""How one batch's range changes the range observed so far."""

from __future__ import annotations

import torch
from torch import Tensor

MOVING_AVERAGE_WEIGHT = 0.01
"""Weight of the newest batch in a settled moving average, as in torch's observers."""


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


def widened(low: Tensor, high: Tensor, batch: Tensor) -> None:
    """Widen ``low`` and ``high`` at once to the range of a batch, in place; arguments as above.

    An average alone follows growing values too slowly: what lies outside is clipped and gets no
    gradient, so that an output beyond its range never comes back.
    """
    torch.minimum(low, -batch[0], out=low)
    torch.maximum(high, batch[1], out=high)


def minmax(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Widen ``low`` and ``high`` to the range of one batch, in place; arguments as above.

    The very first batch replaces what stands there.
    """
    first = batches == 0
    low.copy_(torch.where(first, -batch[0], torch.minimum(low, -batch[0])))
    high.copy_(torch.where(first, batch[1], torch.maximum(high, batch[1])))


def replaced(low: Tensor, high: Tensor, batch: Tensor, batches: Tensor) -> None:
    """Take the newest range, which stands for all batches, in place; arguments as above.

    A range that is not finite stays, for the conversion to refuse.
    """
    low.copy_(torch.where(low.isinf(), low, -batch[0]))
    high.copy_(torch.where(high.isinf(), high, batch[1]))
