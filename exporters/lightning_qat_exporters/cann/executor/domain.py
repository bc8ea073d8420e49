"""Names and limits that the executor's files share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DOMAIN = "lightning_qat.reference"
_INT32 = np.iinfo(np.int32)
_EXACT_IN_FLOAT32 = 2**24


_LEFT: ContextVar[int] = ContextVar("bytes_left", default=2**63)


class NodeRefused(ValueError):
    """A node has no meaning here, or not for its data; the message names it."""


@contextmanager
def allocate_at_most(count: int) -> Iterator[None]:
    """Limit what ``require_room`` allows, inside a ``with`` block."""
    token = _LEFT.set(count)
    try:
        yield
    finally:
        _LEFT.reset(token)


def require_room(what: str, shape: Iterable[int], itemsize: int) -> None:
    """Raise ``ValueError`` before an array is made that is larger than what is allowed.

    Args:
        what: What it is for.
        shape: Its shape.
        itemsize: Bytes of an element.
    """
    sizes = [int(size) for size in shape]
    if any(size < 0 for size in sizes):
        raise ValueError(f"{what} would have the sizes {sizes}")
    if math.prod(sizes) * itemsize > _LEFT.get():
        raise ValueError(
            f"{what} would take {math.prod(sizes) * itemsize} bytes; {_LEFT.get()} are left"
        )


def require(label: str, attribute: str, value: Any, known: Mapping[Any, Any]) -> None:
    """Raise ``ValueError`` unless an attribute of the node ``label`` has a known value."""
    if value not in known:
        raise NodeRefused(f"{attribute} of {label!r} must be one of {list(known)}; got {value!r}.")
