"""The tensors in what a module takes and returns, those in dataclasses of the user included."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def leaves_of(value: Any) -> list[Any]:
    """The leaves of nested containers, dataclasses included, in order.

    Example:
        >>> leaves_of({"a": [1, 2], "b": (3,)})
        [1, 2, 3]
    """
    leaves: list[Any] = []
    for leaf in pytree.tree_leaves(value):
        leaves += leaves_of_dataclass(leaf) if is_opaque(leaf) else [leaf]
    return leaves


def leaves_of_dataclass(value: Any) -> list[Any]:
    """The leaves in the fields of a dataclass."""
    return [leaf for field in fields(value) for leaf in leaves_of(getattr(value, field.name))]


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with ``function(leaf)`` for each leaf, in order."""

    def mapped(leaf: Any) -> Any:
        if not is_opaque(leaf):
            return function(leaf)
        twin = copy.copy(leaf)
        for field in fields(leaf):
            # Also of a frozen one.
            object.__setattr__(twin, field.name, map_leaves(function, getattr(leaf, field.name)))
        return twin

    return pytree.tree_map(mapped, value)


def without_dataclasses(value: Any) -> Any:
    """The same containers with a dict of its fields in the place of each dataclass."""

    def opened(leaf: Any) -> Any:
        if not is_opaque(leaf):
            return leaf
        names = [field.name for field in fields(leaf)]
        return {name: without_dataclasses(getattr(leaf, name)) for name in names}

    return pytree.tree_map(opened, value)


def is_opaque(value: Any) -> bool:
    """Whether a value is a dataclass into which torch does not look."""
    if isinstance(value, Tensor):
        return False
    registered = pytree.SUPPORTED_NODES
    return is_dataclass(value) and not isinstance(value, type) and type(value) not in registered
