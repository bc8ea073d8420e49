"""Masks of attention that is written by hand: what they are added to is on no grid.

A mask leaves keys out by a number so small that a softmax gives zero. On a grid that reaches down
to it, all scores would be one integer. So the softmax of masked scores reads float, and what adds
the mask does; what is added from constants alone (a mask, or a bias of the distance) is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.joins.calls import CASTS
from lightning_qat.joins.solver import Event, Producer
from lightning_qat.model.torch_private import without_function_modes
from lightning_qat.numerics.min_max import batch_range

_SPAN = 1000.0
"""A softmax gives zeros where its input is that far below the maximum: a mask, no scores."""
_MASKING = frozenset("where masked_fill".split())
_ADDING = frozenset("add sub".split())
_CARRYING = CASTS | _ADDING | {"maximum", "max"}


class MaskedScores:
    """Follows through one forward the tensors that hold a mask, or to which one may be added."""

    def __init__(self) -> None:
        self._events: dict[Key, tuple[Event, ...]] = {}

    def __contains__(self, x: Tensor) -> bool:
        return key_of(x) in self._events

    def follow(
        self,
        name: str,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[Key],
        *,
        keeps_values: bool,
        is_exact: Callable[[Tensor], bool],
        events: Sequence[Event],
    ) -> None:
        """Note whether the results of a call hold a mask.

        Args:
            name: Name of the function.
            args: Its arguments by position.
            kwargs: Its arguments by keyword.
            results: What it returned.
            keeps_values: The results have values of the first operand.
            is_exact: Whether a tensor is a constant.
            events: What the call has been planned to quantize.
        """
        given = pytree.tree_leaves((args, kwargs))
        tensors = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
        masks = name in _MASKING or (name in _ADDING and any(map(is_exact, tensors)))
        # A float mask that the model is given: ``(1.0 - mask) * -10000.0``.
        masks |= name == "mul" and any(isinstance(x, float | int) and x <= -_SPAN for x in given)
        carries = masks or keeps_values or name in _CARRYING
        known = [self._events[key_of(x)] for x in tensors if x in self]
        if masks or (carries and known):
            planned = tuple(events) if name in _ADDING else ()
            found = sum(known, planned)
            self._events.update(dict.fromkeys(results, found))

    def read_by_softmax(self, x: Tensor) -> tuple[Event, ...]:
        """What must not be planned, because a softmax reads the masked scores."""
        return self._events.get(key_of(x), ())

    def why_float(
        self, name: str, tensors: Iterable[Tensor], producers: Mapping[Key, Producer]
    ) -> str | None:
        """Why a call with a mask in it stays float; ``None``: it has none.

        Args:
            name: Name of the operator.
            tensors: Its operands.
            producers: What makes each tensor.
        """
        for x in tensors:
            made = producers.get(key_of(x))
            if name == "softmax" and x in self:
                where = f" from {made.name}" if made is not None else ""
                return f"its input comes{where}, so it holds a mask"
            with without_function_modes():
                below, high = batch_range(x.detach()).tolist()
            # What is not a number is infinite on both sides.
            if math.isinf(below) and high < math.inf:
                return "an operand holds minus infinity, as masks do, which is on no grid"
            if name == "softmax" and _SPAN < below + high < math.inf:
                return f"its input spans {below + high:.3g}, so it holds a mask"
        return None
