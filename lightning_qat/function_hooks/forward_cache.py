"""Cache of one forward: every tensor is quantized once, no matter how many operations read it."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from lightning_qat.function_hooks.quantizer_protocol import Observations
from lightning_qat.function_hooks.relu_fusion import ClampCall, ReluCallSite, ReluFusion
from lightning_qat.model.torch_private import autograd_context

Key = tuple[int, int]
"""Identity of a tensor's value: the object, and how often it was changed in place."""


class ForwardCache:
    """The quantized tensors of one forward.

    An in-place operation makes a new value of the same object: the version is part of the identity.
    The cache keeps no tensor alive: an entry disappears together with its tensor. An entry holds
    only where autograd does the same as when it was made: a checkpointed block finds nothing of the
    outside when it runs again, and a result without a gradient is of no use where one is wanted.

    Args:
        traced: It belongs to a graph that ``torch.compile`` makes.
        may_run_again: Backward may run the whole forward again.
    """

    def __init__(self, *, traced: bool, may_run_again: bool = False) -> None:
        self.traced = traced
        self.may_run_again = may_run_again
        # By identity of the tensor; then by version, autograd's context, and whose grid.
        self._quantized: dict[int, dict[tuple[int, object, int], Tensor | None]] = {}
        self._grid: dict[int, dict[tuple[int, object], int]] = {}
        self._changes: Counter[int] = Counter()
        self._viewed: set[int] = set()
        self.relu_fusion = ReluFusion()
        """The results of relu, and their readers."""
        self.weights: dict[int, Any] = {}
        """Weights that are quantized together in this forward, by the identity of the quantizer."""
        self.runs: Counter[int] = Counter()
        """How often each hooked module has run, by the identity of its hooks."""
        self.observations: Observations | None = None
        """What waits for the end of the forward; a forward that raises is not observed."""
        self.runs_again = False
        """Backward will run parts of the forward again."""
        self._watched: dict[int, weakref.ref[Tensor]] = {}
        # A compiler's own tensors, which it does not let be watched, live as long as its graph.
        self._traced_tensors: list[object] = []

    def quantize(
        self,
        x: Tensor,
        quantizer: object,
        compute: Callable[[Tensor, bool], Tensor],
        *,
        skip: bool,
    ) -> Tensor:
        """Return ``compute(x, new)``, computed once per forward, tensor value and quantizer.

        Args:
            x: What to quantize.
            quantizer: Identity of the quantizer.
            compute: The quantization; ``new``: the quantizer has not read the tensor in this
                forward, see ``is_observed``.
            skip: Return ``x`` itself if this quantizer has produced it already.
        """
        (number, version), owner = self._key(x), id(quantizer)
        context = autograd_context()
        grid = self._grid.get(number)
        if skip and grid is not None and grid.get((version, context)) == owner:
            return x
        known = self._quantized.get(number)
        if known is None:
            known = self._quantized[number] = {}
            self._watch(x)
        key = version, context, owner
        if key not in known:
            seen = (known or grid) and self.is_observed(x, quantizer)
            found = compute(x, not seen)
            # A quantizer may hand its input on, which must not be kept alive by itself.
            known[key] = None if found is x else found
            self._put(found, owner)
            return found
        again = known[key]
        return x if again is None else again

    def is_observed(self, x: Tensor, quantizer: object) -> bool:
        """Whether a quantizer has observed a tensor in this forward, whatever autograd did then.

        What it has quantized is, and what lies on its grid: values of a tensor that it has read.
        """
        (number, version), owner = self._key(x), id(quantizer)
        quantized, grid = self._quantized.get(number, {}), self._grid.get(number, {})
        return any(key[0] == version and key[2] == owner for key in quantized) or any(
            key[0] == version and grid[key] == owner for key in grid
        )

    def is_on_grid(self, x: Tensor) -> bool:
        """Whether a tensor lies on any grid."""
        return self._owner(x) is not None

    def relu_and_quantizer(self, site: ReluCallSite, relu: ClampCall) -> Tensor | None:
        """Relu and its reader in one pass; see ``ReluFusion.fused``."""
        fused = self.relu_fusion.fused(site, relu)
        if fused is None:
            return None
        result, quantized, quantizer = fused
        self._put(quantized, id(quantizer.identity))
        return result

    def note_same_values(self, source: Tensor, result: Tensor) -> None:
        """Note that ``result`` holds values of ``source``: it lies on the same grid."""
        if versionless(source):
            self._viewed |= {id(source), id(result)}
            self._watch(source, result)
        owner = self._owner(source)
        if owner is not None:
            self._put(result, owner)

    def note_in_place_change(self, x: Tensor) -> None:
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
        self.weights.clear()
        self.relu_fusion.close()
        self._traced_tensors.clear()

    def _owner(self, x: Tensor) -> int | None:
        number, version = self._key(x)
        return self._grid.get(number, {}).get((version, autograd_context()))

    def _put(self, x: Tensor, owner: int) -> None:
        number, version = self._key(x)
        self._grid.setdefault(number, {})[version, autograd_context()] = owner
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


def key_of(x: Tensor) -> Key:
    """The identity of a tensor's present value."""
    return id(x), 0 if x.is_inference() else x._version


def versionless(x: Tensor) -> bool:
    """Whether torch does not tell how often a tensor was changed in place.

    It does not in inference mode, nor while ``torch.compile`` traces.
    """
    return is_dynamo_compiling() or x.is_inference()
