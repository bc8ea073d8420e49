"""Decide which recorded tensors share a quantizer, and name the quantizers: pure functions.

Discovery records the events of one forward; ``solve`` reads them in order. The tensors with one
scale and zero point form a group, and each group gets one quantizer. The rules:

1. An event that quantizes puts each of its tensors into a group. Two tensors of one ``concat``
   share a group, and so do two tensors that the same operand receives (a call in a module that runs
   twice).
2. What an operator outputs with values of its input (reshape, max pool, a concatenation's result)
   inherits the group of the input. An event of such an operator alone asks for no quantizer, unless
   the input is needed elsewhere.
3. A group is named after its first consumer; a layer's input goes before calls. Other layers of
   the group are linked to that quantizer; calls refer to it in the table of sites.

A residual block, ``y = conv1(x); z = relu(y) + x; return conv2(z)``, records::

    conv1 input       consumes x                  group 0: conv1, add operand 1
    relu              consumes y, outputs r       no quantizer of its own: see below
    add, operand 0    consumes r                  group 1: add operand 0
    add, operand 1    consumes x                  (x has group 0)
    conv2 input       consumes z                  group 2: conv2

``y`` is in no group when relu reads it, so relu stays outside, and ``r`` gets a quantizer where the
addition reads it. The plan has three quantizers: ``conv1.input_quantizer`` (also read by the
addition), ``qat_joins.add_0_0`` and ``conv2.input_quantizer``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lightning_qat.function_hooks.forward_cache import Key
from lightning_qat.function_hooks.frame import without_caller
from lightning_qat.function_hooks.function_table import reader_kind
from lightning_qat.joins.calls import INPUT, Operand
from lightning_qat.joins.plan import JoinPlan, PlannedTensor
from lightning_qat.joins.products import WeightUse, weight_quantizers
from lightning_qat.quantizers.factory import learns
from lightning_qat.recipe.specs import ActivationSpec


@dataclass
class Event:
    """One consumption of tensors.

    Args:
        consumers: One per tensor.
        tensors: The tensors that are consumed.
        outputs: The tensors that keep the scale and zero point of the first one.
        quantizes: The consumers need quantized tensors.
        fused_by: The convolution that adds the other operand of a sum inside its kernel, so that
            its output, the only tensor of this event, is to stay float; empty: none.
    """

    consumers: tuple[Operand, ...]
    tensors: tuple[Key, ...]
    outputs: tuple[Key, ...] = ()
    quantizes: bool = True
    fused_by: str = ""


@dataclass
class Producer:
    """What makes a tensor, and what is known of its range.

    Args:
        name: Module path and function.
        place: Its module and the place in the code, where that is the user's.
        fixed_range: The range that it has by definition.
        not_negative: It has no negative values.
    """

    name: str
    fixed_range: tuple[float, float] | None = None
    not_negative: bool = False
    place: tuple[str, str] = ("", "")


@dataclass
class Recording:
    """What one forward has shown.

    Attributes:
        events: In the order of the forward.
        producers: What makes each tensor; a tensor without an entry is an input of the model.
        call_keys: Module path to the keys of all its calls, as an ordered set.
        chains: Module path to the functions of the user through which it makes them.
        owners: Modules that make calls which the plan must know, as an ordered set.
        left_float: Calls that stay float, and why, to their number.
        weights: The weights that products read, which no layer calls.
    """

    events: list[Event] = field(default_factory=list)
    producers: dict[Key, Producer] = field(default_factory=dict)
    call_keys: dict[str, dict[str, None]] = field(default_factory=dict)
    chains: dict[str, dict[str, None]] = field(default_factory=dict)
    owners: dict[str, None] = field(default_factory=dict)
    left_float: dict[str, int] = field(default_factory=dict)
    weights: list[WeightUse] = field(default_factory=list)

    @property
    def named_left_float(self) -> tuple[str, ...]:
        """The calls that stay float in words, with their number where there are several."""
        return tuple(
            f"{call} ({count} calls)" if count > 1 else call
            for call, count in self.left_float.items()
            if count
        )


class Solution(NamedTuple):
    """A plan, and the consumers that each of its quantizers serves.

    Args:
        plan: The plan.
        consumers: Quantizer path to consumers.
    """

    plan: JoinPlan
    consumers: Mapping[str, Sequence[Operand]]


def solve(recording: Recording, spec_of: Callable[[Operand], ActivationSpec]) -> Solution:
    """Make the plan of a recorded forward.

    Args:
        recording: The forward.
        spec_of: The spec that the recipe gives to a consumer, before what is known of the range.
    """
    events, fused = without_fused(recording.events)
    group_of, tensors_of = group_consumers(events)
    consumers: dict[int, list[Operand]] = {}
    for operand, group in group_of.items():
        consumers.setdefault(group, []).append(operand)
    planned: list[PlannedTensor] = []
    quantizers: dict[int, str] = {}
    for group, operands in consumers.items():
        owner = next((o for o in operands if o.function == INPUT), operands[0])
        # A product has the bits of a layer; see ``Recipe.join_bits``.
        products = (o for o in operands if reader_kind(o.function) == "product")
        decides = owner if owner.function == INPUT else next(products, owner)
        producers = [recording.producers.get(k) or Producer(INPUT) for k in tensors_of[group]]
        spec = with_known_range(spec_of(decides), producers)
        quantizers[group] = owner.quantizer_path
        made_by = tuple(dict.fromkeys(producer.name for producer in producers))
        planned.append(PlannedTensor(quantizers[group], spec, made_by, tuple(map(str, operands))))
    sites: dict[str, dict[str, dict[str, str]]] = {
        path: {key: {} for key in recording.call_keys.get(path, ())} for path in recording.owners
    }
    links: dict[str, str] = {}
    for operand, group in group_of.items():
        if operand.function != INPUT:
            calls = sites.setdefault(operand.module, {})
            calls.setdefault(operand.call_key, {})[str(operand.operand)] = quantizers[group]
        elif operand.quantizer_path != quantizers[group]:
            links[operand.module] = quantizers[group]
    weights = weight_quantizers(recording.weights)
    for operand, (path, _) in weights.items():
        calls = sites.setdefault(operand.module, {})
        calls.setdefault(operand.call_key, {})[str(operand.operand)] = path
    planned += dict.fromkeys(tensor for _, tensor in weights.values() if tensor is not None)
    plan = JoinPlan(tuple(planned), sites, links, (*recording.named_left_float, *fused))
    return Solution(plan, {name: consumers[group] for group, name in quantizers.items()})


def without_fused(events: Sequence[Event]) -> tuple[list[Event], tuple[str, ...]]:
    """Leave out the operands of sums that convolutions add inside their kernels.

    An operand stays quantized where something else reads its tensor, or where the same call has
    another tensor there in another run.

    Returns:
        The other events, and a sentence for each operand that is left out.
    """
    reads = Counter(key for event in events for key in event.tensors)
    quantized = {
        consumer
        for event in events
        for consumer in event.consumers
        if not event.fused_by or reads[event.tensors[0]] > 1
    }
    kept, fused = [], dict[str, None]()
    for event in events:
        if event.fused_by and event.consumers[0] not in quantized:
            why = f"{event.fused_by} adds the other operand in its kernel (joins='fused_sums')"
            fused[f"{event.consumers[0]}: {why}"] = None
        else:
            kept.append(event)
    return kept, tuple(fused)


def group_consumers(events: Sequence[Event]) -> tuple[dict[Operand, int], dict[int, list[Key]]]:
    """Group the consumers that share a quantizer.

    Returns:
        The group of each consumer that needs a quantizer, in the order of the forward; and the
        tensors of each group, without those that inherit it.
    """
    groups = _DisjointSets()
    needed = _needed_tensors(events)
    group: dict[Key, int] = {}
    inherited: set[Key] = set()
    tensors: dict[int, list[Key]] = {}
    consumers: dict[Operand, int] = {}
    for event in events:
        first = event.tensors[0]
        if not (event.quantizes or first in group or first in needed):
            continue
        for key in event.tensors:
            if key not in group:
                group[key] = groups.new()
                tensors[group[key]] = [key]
        numbers = [group[key] for key in event.tensors]
        for number in numbers[1:]:
            groups.join(numbers[0], number)
        # An operator that keeps values needs no quantizer for a tensor that inherits its scale.
        if event.quantizes or first not in inherited:
            for consumer, number in zip(event.consumers, numbers, strict=True):
                groups.join(consumers.setdefault(consumer, number), number)
        for key in event.outputs:
            group[key] = numbers[0]
            inherited.add(key)
    merged: dict[int, list[Key]] = {}
    for number, keys in tensors.items():
        merged.setdefault(groups.find(number), []).extend(keys)
    return {consumer: groups.find(number) for consumer, number in consumers.items()}, merged


def _needed_tensors(events: Sequence[Event]) -> set[Key]:
    """The tensors that some consumer needs quantized."""
    needed = {key for event in events if event.quantizes for key in event.tensors}
    # What is upsampled is quantized before, where it is small, and by what makes it.
    for event in reversed(events):
        if event.consumers[0].function == "interpolate" and needed & set(event.outputs):
            needed.add(event.tensors[0])
    return needed


def with_known_range(spec: ActivationSpec, producers: Iterable[Producer]) -> ActivationSpec:
    """A spec with what is known of the range of all tensors that a quantizer serves."""
    if spec.symmetric or spec.clip is not None or spec.fixed_min is not None:
        return spec
    producers = list(producers)
    # A learned range may well be narrower than what a function can give.
    fixed = {None if learns(spec) else producer.fixed_range for producer in producers}
    if len(fixed) == 1 and None not in fixed:
        return replace(spec, clip=fixed.pop())
    if all(producer.not_negative for producer in producers):
        return replace(spec, fixed_min=True)
    return spec


def told_apart(recording: Recording, with_layers: Collection[str] = ()) -> Recording:
    """A recording in which only modules that serve several places tell their runs apart.

    An activation that many layers share has a range for each of them. A module with weights of its
    own, such as a step of a recurrence, has one range for all its runs, as its layers have.

    Args:
        recording: What a forward has shown; every call names its run.
        with_layers: Paths of the modules that have layers.
    """
    once = {
        path
        for path, keys in recording.call_keys.items()
        if path in with_layers or len({key.removeprefix(without_caller(key)) for key in keys}) == 1
    }

    def named(consumer: Operand) -> Operand:
        if consumer.module not in once:
            return consumer
        return replace(consumer, call_key=without_caller(consumer.call_key))

    events = [
        replace(event, consumers=tuple(map(named, event.consumers))) for event in recording.events
    ]
    call_keys = {
        path: dict.fromkeys(map(without_caller, keys)) if path in once else keys
        for path, keys in recording.call_keys.items()
    }
    weights = [replace(use, operand=named(use.operand)) for use in recording.weights]
    return replace(recording, events=events, call_keys=call_keys, weights=weights)


class _DisjointSets:
    """Disjoint sets of numbers; the smallest number of a set represents it."""

    def __init__(self) -> None:
        self._parent: list[int] = []

    def new(self) -> int:
        self._parent.append(len(self._parent))
        return self._parent[-1]

    def find(self, number: int) -> int:
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self._parent[max(a, b)] = min(a, b)
