"""Find the cheapest assignment that a test accepts: a ladder of choices for each layer."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_qat.insight.sensitivity.switched_model import Choice

Assigned = dict[str, Choice]


@dataclass(frozen=True)
class Ladders:
    """The choices of every layer, from the cheapest to the most precise.

    Args:
        choices: Layer to its choices, at least one.
        expense: What a choice costs; it never falls along a ladder.
        predicted: What a choice is expected to take from the metric; it orders the steps.
    """

    choices: Mapping[str, Sequence[Choice]]
    expense: Callable[[str, Choice], float]
    predicted: Callable[[str, Choice], float]

    def at(self, steps: Mapping[str, int]) -> Assigned:
        """The assignment at a step of each ladder."""
        return {layer: choices[steps[layer]] for layer, choices in self.choices.items()}

    def cost(self, steps: Mapping[str, int]) -> float:
        """What an assignment costs."""
        return sum(self.expense(layer, bits) for layer, bits in self.at(steps).items())

    def lowest(self) -> dict[str, int]:
        """The first step of every ladder."""
        return dict.fromkeys(self.choices, 0)

    def climb(self) -> list[str]:
        """The steps from the lowest to the highest, those that gain most for their cost first."""
        several = [(n, layer) for n, (layer, c) in enumerate(self.choices.items()) if len(c) > 1]
        heap = [(-self._gain(layer, 0), n, layer, 0) for n, layer in several]
        heapq.heapify(heap)
        order = []
        while heap:
            _, number, layer, step = heapq.heappop(heap)
            order.append(layer)
            if step + 2 < len(self.choices[layer]):
                heapq.heappush(heap, (-self._gain(layer, step + 1), number, layer, step + 1))
        return order

    def _gain(self, layer: str, step: int) -> float:
        """What the step above is expected to win, for what it costs."""
        here, *above = self.choices[layer][step : step + 2]
        gained = self.predicted(layer, here) - self.predicted(layer, above[0])
        extra = self.expense(layer, above[0]) - self.expense(layer, here)
        return gained / extra if extra > 0 else gained

    def cheaper_than(self, limit: float) -> Iterator[Assigned]:
        """Every assignment that costs less, the cheapest first."""
        layers = list(self.choices)
        heap: list[tuple[float, tuple[int, ...]]] = []
        heapq.heappush(heap, (self.cost(self.lowest()), (0,) * len(layers)))
        seen = set[tuple[int, ...]]()
        while heap and heap[0][0] < limit:
            cost, steps = heapq.heappop(heap)
            yield self.at(dict(zip(layers, steps, strict=True)))
            for n, layer in enumerate(layers):
                here, *above = self.choices[layer][steps[n] : steps[n] + 2]
                higher = (*steps[:n], steps[n] + 1, *steps[n + 1 :])
                if above and higher not in seen:
                    seen.add(higher)
                    extra = self.expense(layer, above[0]) - self.expense(layer, here)
                    heapq.heappush(heap, (cost + extra, higher))


@dataclass(frozen=True)
class SearchResult:
    """What was found.

    Args:
        assignment: The cheapest assignment that the test accepts; ``None``: it accepts none.
        is_least: All assignments that cost less have been tested.
    """

    assignment: Assigned | None
    is_least: bool


def search(ladders: Ladders, is_good: Callable[[Assigned], bool], most: int) -> SearchResult:
    """Find the cheapest assignment that a test accepts.

    Steps are taken in the order of ``climb`` until the test accepts; each is taken back if it is
    not needed; then all that is cheaper is tested, if it is little.

    Args:
        ladders: The choices.
        is_good: The test; called again for the same assignment it must be cheap.
        most: How many cheaper assignments are tested at most, to see that none is accepted; if
            there are more, none of them is.

    Example:
        >>> ladders = Ladders(
        ...     {"a": (4, 8), "b": (4, 8), "c": (4, 8)},
        ...     expense=lambda layer, bits: float(bits == 8),
        ...     predicted=lambda layer, bits: {"a": 3.0, "b": 2.0, "c": 1.0}[layer] / bits,
        ... )
        >>> search(ladders, lambda bits: bits["c"] == 8, most=100).assignment
        {'a': 4, 'b': 4, 'c': 8}
    """
    path = [ladders.lowest()]
    for layer in ladders.climb():
        path.append(path[-1] | {layer: path[-1][layer] + 1})
    if is_good(ladders.at(path[0])):
        return SearchResult(ladders.at(path[0]), is_least=True)
    steps = _first_good(path, lambda steps: is_good(ladders.at(steps)), most)
    if steps is not None:
        for layer in reversed(ladders.climb()):
            lower = steps | {layer: steps[layer] - 1}
            if steps[layer] and is_good(ladders.at(lower)):
                steps = lower
    found = None if steps is None else ladders.at(steps)
    limit = math.inf if steps is None else ladders.cost(steps)
    cheaper = list(itertools.islice(ladders.cheaper_than(limit), most + 1))
    if len(cheaper) > most:
        return SearchResult(found, is_least=False)
    return SearchResult(next(filter(is_good, cheaper), found), is_least=True)


def _first_good(
    path: Sequence[dict[str, int]], is_good: Callable[[dict[str, int]], bool], most: int
) -> dict[str, int] | None:
    """A place on a path where the test begins to accept, by halving; the first place fails."""
    bad, good = 0, len(path) - 1
    if not is_good(path[good]):
        # More bits are not always better: quantizing one tensor may make up for another.
        return next(filter(is_good, path[1:most]), None)
    while good - bad > 1:
        middle = (bad + good) // 2
        bad, good = (bad, middle) if is_good(path[middle]) else (middle, good)
    return path[good]
