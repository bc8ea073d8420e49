"""What one forward has quantized so far: each tensor once, however many consumers it has."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Key = tuple[int, int]
"""Identity of a tensor's value: the object, and how often it was changed in place."""


class Tape:
    """The tensors of one forward that are on a grid, and their quantized forms.

    An in-place operation makes a new value of the same object: the version is part of the identity.
    """

    def __init__(self) -> None:
        self._quantized: dict[tuple[Key, int], Tensor] = {}
        self._grid: dict[Key, int] = {}
        self.calls: Counter[int] = Counter()
        """How often each watched module has run, by identity."""
        # Ids are only unique among living objects.
        self._alive: list[object] = []

    def quantize(
        self, x: Tensor, quantizer: object, compute: Callable[[Tensor], Tensor], *, skip: bool
    ) -> Tensor:
        """``compute(x)``, unless this forward has it already.

        Args:
            x: What to quantize.
            quantizer: Whose grid; compared by identity.
            compute: Quantizes.
            skip: Give ``x`` back as it is when it lies on that grid already.
        """
        key, owner = key_of(x), id(quantizer)
        if skip and self._grid.get(key) == owner:
            return x
        found = self._quantized.get((key, owner))
        if found is None:
            found = compute(x)
            self._alive += (x, quantizer, found)
            self._quantized[key, owner] = found
            self._grid[key_of(found)] = owner
        return found

    def passes(self, source: Tensor, result: Tensor) -> None:
        """Note that ``result`` holds values of ``source``: it lies on the same grid."""
        owner = self._grid.get(key_of(source))
        if owner is not None:
            self._alive.append(result)
            self._grid[key_of(result)] = owner

    def changed(self, x: Tensor) -> None:
        """Note an in-place change where tensors count no versions (inference mode)."""
        if x.is_inference():
            self._grid.pop(key_of(x), None)
            for key, owner in [k for k in self._quantized if k[0] == key_of(x)]:
                del self._quantized[key, owner]


class _Local(threading.local):
    tape: Tape | None = None


_LOCAL = _Local()


def current_tape() -> Tape | None:
    """The tape of the forward that runs in this thread, if it keeps one."""
    return _LOCAL.tape


def hidden() -> AbstractContextManager[object]:
    """Keep a quantizer's own arithmetic from the function mode that watches a model's forward."""
    return nullcontext() if current_tape() is None else torch._C.DisableTorchFunction()


def set_tape(tape: Tape | None) -> None:
    """Begin or end a tape in this thread."""
    _LOCAL.tape = tape


def key_of(x: Tensor) -> Key:
    """The identity of a tensor's present value."""
    return id(x), 0 if x.is_inference() else x._version
