"""Find the tensors of a converted model among those of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from lightning_qat.export.protocol import Array
from lightning_qat.export.trace import TracedTensor

_ALIKE = 0.5
"""A tensor of another scale is the wanted one if its values differ by less, relative to the
wanted ones (root mean square)."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """One quantized tensor of a model.

    Args:
        name: Its name, see ``QuantizeCall``.
        key: Its key.
        scale: Its scale.
        zero_point: Its zero point.
        values: Its values, quantized.
    """

    name: str
    key: str
    scale: float
    zero_point: int
    values: Array


@dataclass(frozen=True, eq=False)
class Layout:
    """How a file's array is turned into the model's: without axes of length 1, in another order.

    Args:
        order: The file's axes, those of length 1 left out, in the model's order.
        shape: The model's shape.
        found: The file's shape.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    found: tuple[int, ...]

    def to_model(self, values: Array) -> Array:
        """A file's values as the model has them."""
        return _squeezed(values).transpose(self.order).reshape(self.shape)

    def to_file(self, values: Array) -> Array:
        """A model's values as the file has them."""
        return np.ascontiguousarray(
            _squeezed(values).transpose(np.argsort(self.order)).reshape(self.found)
        )


@dataclass(frozen=True, eq=False)
class Match:
    """A tensor of a file that is one of the model's.

    Args:
        wanted: The model's.
        found: The file's.
        layout: How the one is turned into the other.
    """

    wanted: Wanted
    found: TracedTensor
    layout: Layout


def align(wanted: Sequence[Wanted], found: Sequence[TracedTensor]) -> Mapping[str, Match]:
    """Match a model's tensors with a file's, both in the order of execution.

    A file that keeps the keys says itself which is which. Otherwise tensors are matched by their
    numbers in an order that both keep: by scale, zero point and values, or, where a file's numbers
    are wrong, by values alone. Of equal candidates the one with the closest values is taken.

    Returns:
        By the names of the model's tensors; what a file does not have is left out.
    """
    by_key: dict[str, TracedTensor] = {}
    seen: Counter[str] = Counter()
    for tensor in found:
        for key in tensor.keys:
            by_key[f"{key}@{seen[key]}"] = tensor
            seen[key] += 1
    if by_key:
        return dict(_by_key(wanted, by_key))
    return _by_numbers(wanted, found)


def _by_key(
    wanted: Sequence[Wanted], by_key: Mapping[str, TracedTensor]
) -> Iterator[tuple[str, Match]]:
    calls: Counter[str] = Counter()
    for one in wanted:
        tensor = by_key.get(f"{one.key}@{calls[one.key]}")
        calls[one.key] += 1
        layout = None if tensor is None else _closest_layout(one.values, tensor.values)[1]
        if tensor is not None and layout is not None:
            yield one.name, Match(one, tensor, layout)


def _by_numbers(wanted: Sequence[Wanted], found: Sequence[TracedTensor]) -> dict[str, Match]:
    """The matching of the highest score that keeps both orders (dynamic programming)."""
    rows, columns = len(wanted), len(found)
    best = np.zeros((rows + 1, columns + 1))
    layouts: dict[tuple[int, int], Layout] = {}
    for i, one in enumerate(wanted):
        same = {j for j, tensor in enumerate(found) if _same_numbers(one, tensor)}
        gains = np.zeros(columns)
        # Values alone decide only where no tensor of these numbers has the right shape.
        for candidates in (same, {*range(columns)} - same):
            for j in candidates:
                error, layout = _closest_layout(one.values, found[j].values)
                if layout is not None and (j in same or error < _ALIKE):
                    gains[j] = (2.0 if j in same else 0.5) + max(0.0, 1.0 - error) / 2
                    layouts[i, j] = layout
            if gains.any():
                break
        for j in range(columns):
            taken = best[i, j] + gains[j] if gains[j] else 0.0
            best[i + 1, j + 1] = max(best[i, j + 1], best[i + 1, j], taken)
    matches: dict[str, Match] = {}
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i, j - 1]:
            j -= 1
        elif best[i, j] == best[i - 1, j]:
            i -= 1
        else:
            i, j = i - 1, j - 1
            matches[wanted[i].name] = Match(wanted[i], found[j], layouts[i, j])
    return dict(reversed(matches.items()))


def _same_numbers(one: Wanted, tensor: TracedTensor) -> bool:
    """The scale up to float32's rounding, for a file may hold its reciprocal."""
    close = abs(tensor.scale - one.scale) <= 1e-6 * abs(one.scale)
    same = close and tensor.zero_point == one.zero_point
    return same and one.values.size == tensor.values.size


def _closest_layout(values: Array, found: Array) -> tuple[float, Layout | None]:
    """The layout whose values are closest, and their relative error (root mean square)."""
    wanted = _squeezed(values)
    squeezed = _squeezed(found)
    if wanted.ndim != squeezed.ndim or sorted(wanted.shape) != sorted(squeezed.shape):
        return np.inf, None
    power = float(np.square(wanted, dtype=np.float64).sum()) or 1.0
    closest: tuple[float, Layout | None] = np.inf, None
    for order in permutations(range(wanted.ndim)):
        if tuple(squeezed.shape[axis] for axis in order) != wanted.shape:
            continue
        difference = np.subtract(squeezed.transpose(order), wanted, dtype=np.float64)
        error = float(np.sqrt(np.square(difference).sum() / power))
        if error < closest[0] or closest[1] is None:
            closest = error, Layout(order, values.shape, found.shape)
        if error == 0:
            break
    return closest


def _squeezed(values: Array) -> Array:
    return values.reshape([size for size in values.shape if size != 1])
