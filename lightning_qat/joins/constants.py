"""The tensors of one forward that no float input reaches: positions, frequencies, masks, tables.

They are no activations. What is computed from them alone stays exact, in training and in files: an
8-bit grid puts the rotary angles of 1,024 positions off by 4 rad.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.function_hooks.function_table import is_in_place

_MAKES_NEW = frozenset(
    "zeros_like ones_like empty_like full_like new_zeros new_ones new_full new_empty "
    "new_tensor".split()
)
"""Functions that read of their tensor no more than its shape and dtype."""
_RANDOM = ("rand", "normal", "bernoulli", "uniform", "exponential", "multinomial", "poisson")
"""Parts of the names of functions whose results are noise, which is data."""


class Origin(IntEnum):
    """What a tensor depends on; of several operands the greatest counts."""

    FIXED = 0
    """Buffers and numbers in the code."""
    INTEGERS = 1
    """Integers and booleans that the model is given: token ids, positions, masks."""
    DATA = 2
    """Float inputs, and products with parameters."""


class ConstantTensors:
    """Follows through one forward what depends on no float input, and on no parameter.

    Args:
        modules: The modules of the model; their buffers, and tensors that are plain attributes, are
            fixed.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._origins: dict[Key, Origin] = {}
        self._alive: list[Tensor] = []
        for module in modules:
            attributes = (x for x in vars(module).values() if type(x) is Tensor)
            for x in (*module._buffers.values(), *attributes):
                if x is not None:
                    self._origins[key_of(x)] = Origin.FIXED

    def origin(self, x: Tensor) -> Origin:
        """What a tensor depends on. A float tensor that was never seen is data.

        A number in the shape of a tensor without axes is fixed, if nothing computed it.
        """
        known = self._origins.get(key_of(x))
        if known is not None:
            return known
        if not x.is_floating_point():
            return Origin.INTEGERS
        return Origin.DATA if x.dim() or x.requires_grad else Origin.FIXED

    def is_exact(self, x: Tensor) -> bool:
        """Whether no float input and no parameter reaches a tensor."""
        return self.origin(x) is not Origin.DATA

    def is_fixed(self, x: Tensor) -> bool:
        """Whether a tensor is the same whatever the model is given."""
        return self.origin(x) is Origin.FIXED

    def follow(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Sequence[Tensor],
        inputs: Origin,
    ) -> bool:
        """Note what the results of a call depend on.

        Args:
            func: The function.
            args: Its arguments by position.
            kwargs: Its arguments by keyword.
            results: The tensors that it returned.
            inputs: ``inputs(...)`` of the call, before it ran.

        Returns:
            Whether the results are exact.
        """
        changed: list[Tensor] = []
        if args and isinstance(args[0], Tensor) and is_in_place(function_spelling(func)):
            changed = [x for x in (args[0], args[0]._base) if x is not None]
        # An identity is good for as long as its tensor lives.
        self._alive += [*results, *changed]
        for x in (*results, *changed):
            self._origins[key_of(x)] = inputs
        return inputs is not Origin.DATA

    def inputs(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Origin:
        """What the arguments of a call depend on, together."""
        name = function_spelling(func)
        if any(part in name for part in _RANDOM):
            return Origin.DATA
        if name in _MAKES_NEW:
            return Origin.FIXED
        given = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return max(map(self.origin, given), default=Origin.FIXED)


def function_spelling(func: Callable[..., Any]) -> str:
    """The very name of a function; ``__setitem__`` changes in place, as ``add_`` does."""
    name = str(getattr(func, "__name__", ""))
    return "setitem_" if name == "__setitem__" else name
