"""Ranges of what training never computes: said in the first minute, given before the export."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_qat.callback.console import say
from lightning_qat.checkpoint.contents import has_ranges
from lightning_qat.quantizers.activation import ActivationQuantizer
from lightning_qat.quantizers.names import place
from lightning_qat.training.calibrate_unseen import calibrate_unseen
from lightning_qat.training.range_sync import activation_quantizers

MOST_NAMES = 8


class UnseenRanges:
    """The quantizers of one run that the exported forward runs and the training does not.

    Attributes:
        batches: The batches that each has seen when it was calibrated, by name.
    """

    def __init__(self) -> None:
        self.batches: dict[str, float] = {}
        self._tried = False

    def report(self, quantizers: Mapping[str, ActivationQuantizer]) -> None:
        """Say which quantizers have seen nothing of a training batch."""
        unseen = [n for n, q in quantizers.items() if q.observing and q.has_seen_nothing]
        if unseen:
            say(
                f"nothing passed through {_listed(map(place, unseen))} in the first training "
                "batch. What training never computes gets its range from the inputs of that batch, "
                "in eval mode, if the exported forward computes it."
            )

    def calibrate(self, pl_module: LightningModule, inputs: Any, *, anew: bool = False) -> None:
        """Give ranges to what training never computes; every process must call it.

        Args:
            pl_module: The module.
            inputs: The inputs of a training batch; ``None``: there are none, and nothing is done.
            anew: Those that had their range from an earlier call, too, for the weights are others.
        """
        # Of a network that was never calibrated the export says so. What one forward in eval mode
        # does not reach, the next one does not either.
        if inputs is None or not has_ranges(pl_module) or (self._tried and not anew):
            return
        self._tried = True
        quantizers = {place(n): q for n, q in activation_quantizers(pl_module).items()}
        # Training may have skipped a layer at random until then, and have observed it since.
        unseen = [n for n, seen in self.batches.items() if float(quantizers[n].batches) == seen]
        found = calibrate_unseen(pl_module, inputs, unseen if anew else ())
        names = [*(unseen if anew else self.batches), *found]
        self.batches = {name: float(quantizers[name].batches) for name in names}

    def report_calibrated(self) -> None:
        """Say whose range is not that of the training."""
        if self.batches:
            say(
                f"training never computed {_listed(self.batches)}; the range is that of the "
                "first training batch's inputs in eval mode."
            )


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    more = len(every) - MOST_NAMES
    return ", ".join(every[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
