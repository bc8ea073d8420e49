"""The table of calibrations: what each looks at in a batch, and how the range follows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_qat.numerics.calibration.search import (
    entropy_range,
    least_squares_range,
    percentile_range,
)
from lightning_qat.numerics.calibration.updates import minmax, moving_average, replaced
from lightning_qat.numerics.qparams import IntegerGrid


@dataclass(frozen=True)
class Calibration:
    """How batches become a range, in pure functions.

    Args:
        update: Takes a batch into the range, in place; called as ``moving_average``.
        search: Finds the range of a batch; called as ``least_squares_range``. ``None``: the
            minimum and maximum.
        histogram: The range is searched over a histogram of all batches.
        averages: The range is an average over batches, narrower than some of them.
        min_max_only: Nothing of a batch but its minimum and maximum is needed, so that the pass
            that quantizes can find them.
    """

    update: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    search: Callable[[Tensor, IntegerGrid, bool, int], Tensor] | None = None
    histogram: bool = False
    averages: bool = field(init=False)
    min_max_only: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "averages", self.update is moving_average)
        object.__setattr__(self, "min_max_only", self.search is None and not self.histogram)


CALIBRATIONS: Mapping[str, Calibration] = {
    "moving_average": Calibration(moving_average),
    "minmax": Calibration(minmax),
    "histogram": Calibration(replaced, histogram=True),
    "percentile": Calibration(moving_average, percentile_range),
    "mse": Calibration(moving_average, least_squares_range),
    "entropy": Calibration(moving_average, entropy_range),
}
"""``ActivationSpec.calibration`` to what it does."""
