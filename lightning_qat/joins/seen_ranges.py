"""The ranges of the tensors of one forward, for quantizers that are made after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.joins.calls import Operand
from lightning_qat.joins.solver import Event, group_consumers
from lightning_qat.model.torch_private import without_function_modes
from lightning_qat.numerics.min_max import batch_range


class SeenRanges:
    """Ranges by the identity of the tensor.

    Args:
        observes: Take ranges; otherwise there are none.
    """

    def __init__(self, *, observes: bool) -> None:
        self._observes = observes
        self._ranges: dict[Key, Tensor] = {}

    def take(self, x: Tensor) -> None:
        """Take the range of a tensor at once: it may be changed in place later."""
        if self._observes and key_of(x) not in self._ranges and x.numel():
            with without_function_modes():
                self._ranges[key_of(x)] = batch_range(x)

    def of(
        self, consumers: Mapping[str, Sequence[Operand]], events: Sequence[Event]
    ) -> Mapping[str, Tensor]:
        """The ranges of the tensors that consumers read, by the path of their quantizer.

        Args:
            consumers: Quantizer path to consumers.
            events: What the forward has shown.
        """
        group_of, tensors_of = group_consumers(events)
        found = {}
        for path, operands in consumers.items():
            groups = dict.fromkeys(group_of[o] for o in operands if o in group_of)
            keys = [key for group in groups for key in tensors_of[group] if key in self._ranges]
            if keys:
                found[path] = torch.stack([self._ranges[key] for key in keys]).amax(0)
        return found
