"""Fuse ReLU with the only quantizer that reads its result: one pass instead of two.

A quantizer clamps anyway. If one quantizer alone reads the result of a relu, the call of relu
returns the quantized tensor at once. The float tensor and ReLU's own backward are then never
created. Which calls can be fused is learned while the model runs; correctness never depends on it:
another reader gets the float tensor, computed then, and that call is not fused again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat.function_hooks.function_table import clamp_ends, is_in_place, torch_functions
from lightning_qat.function_hooks.quantizer_protocol import FusableQuantizer
from lightning_qat.ir.operators import OPERATORS, Clamp
from lightning_qat.model.containers import leaves_of, map_leaves
from lightning_qat.model.torch_private import autograd_context, saved_tensors_are_hooked


class ClampCall(NamedTuple):
    """The arguments of one call of relu, relu6 or hardtanh.

    Args:
        input: The tensor to clamp.
        low: Lower end.
        high: Upper end; infinity: no upper end.
        in_place: The call changes its input.
    """

    input: Tensor
    low: float
    high: float
    in_place: bool

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end."""
        return self.low, self.high

    def __call__(self) -> Tensor:
        """The float result, in new memory."""
        if self.high == math.inf:
            return torch.relu(self.input)
        return F.hardtanh(self.input, self.low, self.high)


def _clamp_call(
    clamp: Clamp, changes_input: bool, /, *args: Any, inplace: bool = False, **kwargs: Any
) -> ClampCall:
    """Read the arguments of a call; ``inplace`` follows the ends."""
    low, high = clamp_ends(clamp, args, kwargs)
    x = args[0] if args else kwargs["input"]
    in_place = changes_input or inplace or any(args[1 + len(clamp.arguments) :])
    return ClampCall(x, low, math.inf if high is None else high, in_place)


CLAMP_CALLS: Mapping[Callable[..., Any], Callable[..., ClampCall]] = {
    function: partial(_clamp_call, operator.clamp, is_in_place(spelling))
    for operator in OPERATORS
    # The two ends of ``torch.clamp`` may be missing, or be tensors.
    if operator.clamp is not None and operator.name != "clamp"
    for spelling in operator.torch
    for function in torch_functions(spelling)
}
"""Every function that can be fused, and what reads the arguments of its calls."""


class ReluCallSite:
    """A call site of relu, and the readers of its result so far."""

    __slots__ = ("quantizer", "unfusable")

    def __init__(self) -> None:
        self.quantizer: FusableQuantizer | None = None
        """The only reader of the last result."""
        self.unfusable = False
        """Something else has read a result: relu and quantizer stay two passes."""


class _Result:
    """The result of one call of relu, or the input that an in-place call would have changed.

    Args:
        site: The call site.
        relu: The call, if its float result is not computed yet.
        quantized: The tensor that the quantizer of the site returns for it.
        seen: The range that the quantizer observes when it reads the tensor.

    Attributes:
        context: What autograd did with the call.
        passed_on: A quantizer has returned it unchanged: what reads it now reads the quantizer's
            result.
    """

    __slots__ = ("context", "float", "passed_on", "quantized", "readers", "relu", "seen", "site")

    def __init__(
        self,
        site: ReluCallSite,
        relu: ClampCall | None = None,
        quantized: Tensor | None = None,
        seen: Tensor | None = None,
    ) -> None:
        self.site, self.relu, self.quantized, self.seen = site, relu, quantized, seen
        self.readers: dict[int, FusableQuantizer] = {}
        self.float: Tensor | None = None
        self.context = autograd_context()
        self.passed_on = False


class ReluFusion:
    """The results of relu in one forward, and who reads them. Keeps no tensor alive for long."""

    def __init__(self) -> None:
        self._by_id: dict[int, tuple[weakref.ref[Tensor], _Result]] = {}
        self._sources: dict[int, tuple[weakref.ref[Tensor], int, ReluCallSite]] = {}
        self._all: list[_Result] = []

    def fused(
        self, site: ReluCallSite, relu: ClampCall
    ) -> tuple[Tensor, Tensor, FusableQuantizer] | None:
        """Relu and quantizer in one pass; ``None``: not here, or not now.

        Returns:
            The tensor in place of relu's result, the quantized tensor that the quantizer returns
            for it, and that quantizer.
        """
        quantizer = site.quantizer
        if site.unfusable or quantizer is None or not _may_fuse(relu.input):
            return None
        found = quantizer.quantize_clamped(relu.input, relu.ends)
        if found is None:
            return None
        quantized, seen = found
        # Another tensor of the same memory: its readers can be told from those of `quantized`.
        result = quantized.view_as(quantized)
        self._note(result, _Result(site, relu, quantized, seen))
        if relu.in_place:
            # The caller may still use this tensor; it still holds the values before relu.
            again = relu._replace(input=relu.input.view_as(relu.input))
            self._note(relu.input, _Result(site, again))
        return result, quantized, quantizer

    def record_result(self, site: ReluCallSite, relu: ClampCall, result: Tensor) -> None:
        """Record the result of a call of relu that was not fused."""
        if site.unfusable or not _may_fuse(result):
            return
        found = _Result(site)
        self._all.append(found)
        self._note(result, found)
        looked_at = result if relu.in_place else relu.input
        # They change together.
        for x in (looked_at, looked_at._base):
            if x is not None:
                self._sources[id(x)] = weakref.ref(x), x._version, site

    def note_in_place_change(self, x: Any) -> None:
        """Stop fusing a relu whose input another call has changed: backward would read it."""
        known = self._sources.get(id(x))
        if known is not None and isinstance(x, Tensor) and known[0]() is x:
            known[2].unfusable |= x._version != known[1]

    def read(self, x: Any) -> Any:
        """Return the float values of a tensor, for a reader that is no quantizer.

        Args:
            x: A tensor; anything else comes back as it is.
        """
        found = self._result_of(x)
        return x if found is None or found.passed_on else self._not_fused(x, found)

    def peek(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
        """Some of the float values of a tensor, without counting as a reader.

        Args:
            x: The tensor.
            part: Chooses the values, of any tensor of that shape.
        """
        found = self._result_of(x)
        if found is None or found.relu is None or found.quantized is None:
            return part(x)
        return found.relu._replace(input=part(found.relu.input))()

    def read_all(self, values: Any) -> Any:
        """Apply ``read`` to all tensors in containers; returns ``values`` if none changes."""
        if not self._by_id or not any(self._result_of(leaf) for leaf in leaves_of(values)):
            return values
        return map_leaves(self.read, values)

    def contains_any(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the arguments of a call contain a recorded tensor, also in a list or tuple."""
        if not self._by_id:
            return False
        for x in (*args, *kwargs.values()) if kwargs else args:
            if id(x) in self._by_id or (isinstance(x, list | tuple) and self.contains_any(x, {})):
                return True
        return False

    def read_by_quantizer(self, x: Tensor, quantizer: FusableQuantizer) -> Tensor:
        """Return the tensor that a quantizer reads: quantized if the call was fused with it."""
        found = self._result_of(x)
        if found is None:
            return x
        if found.context != autograd_context():
            return self._not_fused(x, found)
        if found.relu is None:
            found.readers[id(quantizer)] = quantizer
            return x
        if found.quantized is not None and found.site.quantizer is quantizer:
            if not found.readers:
                found.readers[id(quantizer)] = quantizer
                if found.seen is not None:
                    quantizer.observe(found.seen)
            return found.quantized
        return self._not_fused(x, found)

    def pass_on(self, x: Tensor) -> None:
        """Ignore what reads a tensor and is no quantizer: a quantizer has returned it unchanged."""
        found = self._result_of(x)
        if found is not None:
            found.passed_on = True

    def note_readers(self) -> None:
        """Remember the readers of each result, at the end of the forward."""
        for found in self._all:
            if len(found.readers) > 1:
                found.site.unfusable = True
            elif found.readers:
                (found.site.quantizer,) = found.readers.values()
        self.close()

    def close(self) -> None:
        """Forget everything."""
        self._by_id.clear()
        self._sources.clear()
        self._all.clear()

    def _not_fused(self, x: Tensor, found: _Result) -> Tensor:
        found.site.unfusable = True
        if found.relu is None or found.context != autograd_context():
            # A checkpointed block will run again with this very tensor and without its record.
            return x
        if found.float is None:
            found.float = found.relu()
        return found.float

    def _result_of(self, x: Any) -> _Result | None:
        known = self._by_id.get(id(x))
        return known[1] if known is not None and known[0]() is x else None

    def _note(self, x: Tensor, found: _Result) -> None:
        number = id(x)

        def forget(reference: object) -> None:
            known = self._by_id.get(number)
            if known is not None and known[0] is reference:
                del self._by_id[number]

        self._by_id[number] = weakref.ref(x, forget), found


def _may_fuse(x: Tensor) -> bool:
    """Whether backward may keep a tensor as the fused call does."""
    # Activation checkpointing compares what two forwards have kept.
    return not saved_tensors_are_hooked() and not x.is_inference()
