"""Weights quantized once for several forwards, and together where every launch counts."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling

from lightning_qat.function_hooks.running import current_forward_cache
from lightning_qat.numerics.arithmetic import (
    along_channels,
    arq_scale,
    channels_first,
    symmetric_scale,
)
from lightning_qat.numerics.gpu.launch import runs_kernels, suits
from lightning_qat.numerics.gpu.weights import (
    Channels,
    PieceTable,
    QuantizedWeight,
    fits,
    quantize_weights,
)
from lightning_qat.numerics.int_repr import IntRepr, int_repr_of
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.numerics.transforms import is_transforming
from lightning_qat.recipe.specs import WeightSpec


class QuantizedWeightCache:
    """Keeps quantized weights of earlier forwards, while it is open.

    A weight that was changed in place, or whose memory is another, is quantized anew. What torch
    cannot tell are changes through ``.data``, as some optimizers and averages make them: whoever
    opens this must ``forget`` where such may happen.
    """

    def __init__(self) -> None:
        self.open = False
        self._entries: dict[int, tuple[Any, Tensor | IntRepr]] = {}

    def forget(self) -> None:
        """Quantize every weight anew."""
        self._entries.clear()

    def get(self, owner: object, state: Any) -> Tensor | IntRepr | None:
        """The weight of an owner that was put in the same state, or ``None``."""
        found = self._entries.get(id(owner)) if self.open else None
        return found[1] if found is not None and found[0] == state else None

    def put(self, owner: object, state: Any, quantized: Tensor) -> None:
        """Keep a quantized weight: its integers where it carries any, else a view of its values."""
        if self.open:
            int_repr = int_repr_of(quantized)
            self._entries[id(owner)] = state, quantized.detach() if int_repr is None else int_repr


def tensor_state(*tensors: Tensor) -> Any:
    """A value that changes when the tensors do, as far as torch can tell.

    Rows of a packed parameter are another tensor at every call: what they are a view of is not.
    """
    return tuple((id(t if t._base is None else t._base), t.data_ptr(), t._version) for t in tensors)


class WeightRounding(Protocol):
    """What decides how a weight quantizer rounds.

    Attributes:
        spec: Its rule of the scale.
        grid: The integers in use.
        compact: Integers are kept beside the values.
        channels: Which values share a scale.
    """

    spec: WeightSpec
    grid: IntegerGrid
    compact: bool

    @property
    def channels(self) -> Channels:
        """As ``WeightQuantizer`` has them."""
        ...


class KnownWeight(NamedTuple):
    """A weight that was quantized together with others.

    Args:
        state: Of the weight then.
        values: Real values on the grid.
        int_repr: Its integers, if they are wanted.
    """

    state: Any
    values: Tensor
    int_repr: IntRepr | None


class _Member(NamedTuple):
    """A weight that a group has seen.

    Args:
        quantizer: Its quantizer.
        weight: It, or a tensor of the same memory that keeps no graph.
        stays: It was at the same place when it was seen before.
    """

    quantizer: weakref.ref[WeightRounding]
    weight: Tensor
    stays: bool


class WeightGroup:
    """Quantizes the weights of a model together when the first of them is needed in a forward.

    A weight joins when it has been seen twice at the same place; one that is computed anew in every
    forward never does. Results are good for the forward that needs them; of layers that no hooked
    forward runs, for one use.
    """

    def __init__(self) -> None:
        self._members: dict[int, _Member] = {}
        self._known: dict[int, KnownWeight] = {}
        self._tables: dict[Any, tuple[Any, PieceTable]] = {}

    def __deepcopy__(self, memo: object) -> WeightGroup:
        """A copy of a model has weights of its own, which join when they are quantized."""
        return WeightGroup()

    def __reduce__(self) -> Any:
        return WeightGroup, ()

    def quantized(self, quantizer: WeightRounding, weight: Tensor) -> KnownWeight | None:
        """A weight on its grid; ``None``: it has to be quantized by itself."""
        if (
            is_compiling()
            or is_transforming()
            or (weight.is_cpu and not runs_kernels(weight.device))
        ):
            return None
        with_kernels = suits(weight)
        if not weight.numel() or (with_kernels and not fits(weight, quantizer.channels)):
            return None
        forward = current_forward_cache()
        known = self._known if forward is None else forward.weights
        number, state = id(quantizer), _state(quantizer, weight)
        if number not in known or known[number].state != state:
            known.update(self._quantize(quantizer, weight, with_kernels))
        # What no forward ends would be kept for ever.
        return known.pop(number) if forward is None else known[number]

    def _quantize(
        self, quantizer: WeightRounding, weight: Tensor, with_kernels: bool
    ) -> dict[int, KnownWeight]:
        """Quantize a weight, and with it all others that stay and have the same kind of grid."""
        before = self._members.get(id(quantizer))
        found_again = (
            before is not None
            and before.quantizer() is quantizer
            and _lies(before.weight) == _lies(weight)
        )
        of_quantizer = weakref.ref(quantizer)
        self._members[id(quantizer)] = _Member(of_quantizer, weight.detach(), found_again)
        if before is None or not (found_again and before.stays):
            return self._all_of([(quantizer, weight.detach())], with_kernels=False)
        chosen: list[tuple[WeightRounding, Tensor]] = []
        for number, member in list(self._members.items()):
            other = member.quantizer()
            if other is None:
                del self._members[number]
            elif member.stays and _kind(other, member.weight) == _kind(quantizer, weight):
                chosen.append((other, member.weight))
        return self._all_of(chosen, with_kernels=with_kernels)

    def _all_of(
        self, chosen: list[tuple[WeightRounding, Tensor]], *, with_kernels: bool
    ) -> dict[int, KnownWeight]:
        first, like = chosen[0]
        weights = [weight for _, weight in chosen]
        channels = [quantizer.channels for quantizer, _ in chosen]
        arq = first.spec.quantizer == "arq"
        if with_kernels:
            table = self._table(_kind(first, like), weights, channels)
            found = quantize_weights(table, first.grid, arq=arq, keeps_codes=first.compact)
        else:
            found = _by_operations(weights, channels, first.grid, arq, first.compact)
        known = {}
        for (quantizer, weight), result in zip(chosen, found, strict=True):
            int_repr = None
            if result.codes is not None:
                scale = along_channels(result.scale, weight.shape, quantizer.channels.axis)
                int_repr = IntRepr(result.codes, scale, 0.0)
            state = _state(quantizer, weight)
            known[id(quantizer)] = KnownWeight(state, result.values, int_repr)
        return known

    def _table(self, kind: Any, weights: list[Tensor], channels: list[Channels]) -> PieceTable:
        """The table of these weights, made anew when one of them lies elsewhere."""
        key = [(*_lies(w), c) for w, c in zip(weights, channels, strict=True)]
        if kind not in self._tables or self._tables[kind][0] != key:
            self._tables[kind] = key, PieceTable(weights, channels)
        return self._tables[kind][1]


def _lies(weight: Tensor) -> tuple[Any, ...]:
    """Where a weight is, and how it lies there."""
    return weight.device, weight.dtype, weight.data_ptr(), weight.shape, weight.stride()


def _state(quantizer: WeightRounding, weight: Tensor) -> Any:
    """A value that changes when the weight does, as far as torch can tell."""
    return quantizer.compact, weight.data_ptr(), weight._version, weight.shape, weight.stride()


def _kind(quantizer: WeightRounding, weight: Tensor) -> Any:
    """What weights that are quantized together have in common."""
    arq = quantizer.spec.quantizer == "arq"
    return quantizer.grid, arq, quantizer.compact, weight.device, weight.dtype


@torch.no_grad()
def _by_operations(
    weights: list[Tensor],
    channels: list[Channels],
    grid: IntegerGrid,
    arq: bool,
    keeps_codes: bool,
) -> list[QuantizedWeight]:
    """Five operations of torch per weight, or six; the scales of all are computed together."""
    wide = [weight.to(torch.float32) for weight in weights]
    rows = [_rows(weight, of) for weight, of in zip(wide, channels, strict=True)]
    if arq:
        low, high = (torch.cat([f(r, 1) for r in rows]) for f in (torch.amin, torch.amax))
        flat = arq_scale(low, high, grid)
    else:
        largest = [torch.linalg.vector_norm(r, torch.inf, 1) for r in rows]
        flat = symmetric_scale(torch.cat(largest), grid)
    found = []
    for weight, x, of, scale in zip(
        weights, wide, channels, torch.split(flat, [len(r) for r in rows]), strict=True
    ):
        shaped = along_channels(
            scale if of.axis is not None else scale.reshape(()), x.shape, of.axis
        )
        steps = torch.div(x, shaped).round_().clamp_(grid.qmin, grid.qmax)
        codes = steps.to(torch.int8) if keeps_codes else None
        found.append(QuantizedWeight(steps.mul_(shaped).to(weight.dtype), codes, scale))
    return found


def _rows(weight: Tensor, channels: Channels) -> Tensor:
    """Every channel as a row of a matrix."""
    if channels.axis is None:
        return weight.reshape(1, -1)
    if channels.groups > 1:
        return channels_first(weight, channels.groups).flatten(1)
    return weight.transpose(0, channels.axis).flatten(1)
