"""What one forward has quantized so far: each tensor once, however many consumers it has."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.relu_fusion import ClampCall, ReluCallSite, ReluFusion

Key = tuple[int, int]
"""Identity of a tensor's value: the object, and how often it was changed in place."""


class ForwardCache:
    """The tensors of one forward that are on a grid, and their quantized forms.

    An in-place operation makes a new value of the same object: the version is part of the identity.
    No tensor is kept alive: what is known of one is forgotten with it.

    Args:
        traced: It belongs to a graph that ``torch.compile`` makes.
    """

    def __init__(self, *, traced: bool) -> None:
        self.traced = traced
        # By identity of the tensor; then by version, and whose grid.
        self._quantized: dict[int, dict[tuple[int, int], Tensor | None]] = {}
        self._grid: dict[int, dict[int, int]] = {}
        self._changes: Counter[int] = Counter()
        self._viewed: set[int] = set()
        self.relu_fusion = ReluFusion()
        """What calls of relu gave, and who reads it."""
        self.calls: Counter[int] = Counter()
        """How often each watched module has run, by identity."""
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        # A compiler's own tensors, which it does not let be watched, live as long as its graph.
        self._traced_tensors: list[object] = []

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
        (number, version), owner = self._key(x), id(quantizer)
        if skip and self._owner(x) == owner:
            return x
        known = self._quantized.setdefault(number, {})
        if (version, owner) not in known:
            found = compute(x)
            # A quantizer may hand its input on, which must not be kept alive by itself.
            known[version, owner] = None if found is x else found
            self._watch(x)
            self._put(found, owner)
            return found
        again = known[version, owner]
        return x if again is None else again

    def is_on_grid(self, x: Tensor) -> bool:
        """Whether a tensor lies on any grid."""
        return self._owner(x) is not None

    def relu_and_quantizer(self, site: ReluCallSite, relu: ClampCall) -> Tensor | None:
        """See ``Relus.fused``."""
        fused = self.relu_fusion.fused(site, relu)
        if fused is None:
            return None
        result, quantized = fused
        self._put(quantized, id(site.quantizer.identity))
        return result

    def passes(self, source: Tensor, result: Tensor) -> None:
        """Note that ``result`` holds values of ``source``: it lies on the same grid."""
        if versionless(source):
            self._viewed |= {id(source), id(result)}
            self._watch(source, result)
        owner = self._owner(source)
        if owner is not None:
            self._put(result, owner)

    def changed(self, x: Tensor) -> None:
        """Note an in-place change, which only versionless tensors must be told of."""
        if not versionless(x):
            return
        self._changes[id(x)] += 1
        self._watch(x)
        if id(x) in self._viewed:
            # What shares its memory has changed as well.
            self._quantized.clear()
            self._grid.clear()

    def close(self) -> None:
        """Forget everything; nothing shall outlive the forward."""
        self._quantized.clear()
        self._watched.clear()
        self.relu_fusion.close()
        self._traced_tensors.clear()

    def _owner(self, x: Tensor) -> int | None:
        number, version = self._key(x)
        return self._grid.get(number, {}).get(version)

    def _put(self, x: Tensor, owner: int) -> None:
        number, version = self._key(x)
        self._grid.setdefault(number, {})[version] = owner
        self._watch(x)

    def _watch(self, *tensors: Tensor) -> None:
        """Forget a tensor when it dies: its id may then be another's."""
        if self.traced:
            self._traced_tensors += tensors
            return
        for x in tensors:
            if id(x) not in self._watched:
                self._watched[id(x)] = weakref.ref(x, partial(self._forget, id(x)))

    def _forget(self, number: int, _: object) -> None:
        self._quantized.pop(number, None)
        self._grid.pop(number, None)
        self._changes.pop(number, None)
        self._viewed.discard(number)
        self._watched.pop(number, None)

    def _key(self, x: Tensor) -> Key:
        return (id(x), self._changes[id(x)]) if versionless(x) else key_of(x)


class _Running:
    forward_cache: ForwardCache | None = None
    hidden: bool = False


class _Local(threading.local):
    def __init__(self) -> None:
        # torch.compile reads what a thread's local holds, but misses that it was set anew.
        self.running = _Running()


_LOCAL = _Local()


def current_forward_cache() -> ForwardCache | None:
    """The cache of the forward that runs in this thread, if it keeps one.

    A cache holds tensors of its own forward, so a graph that ``torch.compile`` makes of a part of
    it keeps its own, or none.
    """
    forward_cache = _LOCAL.running.forward_cache
    return (
        forward_cache
        if forward_cache is None or forward_cache.traced == is_dynamo_compiling()
        else None
    )


def swap_forward_cache(forward_cache: ForwardCache | None) -> ForwardCache | None:
    """Set the cache of this thread; returns the one before."""
    before, _LOCAL.running.forward_cache = _LOCAL.running.forward_cache, forward_cache
    return before


def hidden() -> AbstractContextManager[object]:
    """Keep a quantizer's own arithmetic from the function mode that watches a model's forward."""
    if is_dynamo_compiling():
        return Hidden(_LOCAL.running)
    return nullcontext() if current_forward_cache() is None else torch._C.DisableTorchFunction()


def unseen() -> AbstractContextManager[object]:
    """Keep a layer's arithmetic from the function modes, from the one that makes the plan as well.

    It is no join of the model's.
    """
    if is_dynamo_compiling():
        return Hidden(_LOCAL.running)
    return torch._C.DisableTorchFunction()


class Hidden:
    """``hidden`` for ``torch.compile``, which does not heed ``DisableTorchFunction``."""

    def __init__(self, running: _Running) -> None:
        self._running = running

    def __enter__(self) -> None:
        self._before, self._running.hidden = self._running.hidden, True

    def __exit__(self, *exception: object) -> None:
        self._running.hidden = self._before


def is_hidden() -> bool:
    """Whether what ``torch.compile`` traces is inside ``hidden``."""
    return _LOCAL.running.hidden


def key_of(x: Tensor) -> Key:
    """The identity of a tensor's present value."""
    return id(x), 0 if x.is_inference() else x._version


def versionless(x: Tensor) -> bool:
    """Whether torch does not tell how often a tensor was changed in place.

    It does not in inference mode, nor while ``torch.compile`` traces.
    """
    return is_dynamo_compiling() or x.is_inference()
