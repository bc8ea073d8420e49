"""From measurements to a recipe that keeps a budget: layers in float, or bits for each layer."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_qat.insight.sensitivity.candidates import Candidates
from lightning_qat.insight.sensitivity.result import LayerSize, Sensitivity
from lightning_qat.insight.sensitivity.search import Ladders, search
from lightning_qat.insight.sensitivity.switched_model import Choice
from lightning_qat.recipe.recipe import Recipe

Minimize = Literal["layers", "size", "bops"]
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Suggestion:
    """A recipe that keeps a budget. ``print`` shows what it changes.

    Args:
        recipe: The recipe, for ``prepare`` and ``QATCallback``.
        changes: The layers that it treats otherwise than the recipe that was measured: bits of the
            weight, or ``None`` for float.
        metric: What was measured, in words.
        value: The metric with this recipe.
        float_value: The metric of the float model.
        budget: The budget.
        evaluations: How many there were.
        is_least: Whether all cheaper candidates have been measured, and miss the budget.
        size: Bytes of all quantized layers' weights; biases and scales are not counted.
        float_size: The same in float32.
        bops: Bit operations over those of float32: multiplications times bits of both factors.
    """

    recipe: Recipe
    changes: Mapping[str, Choice]
    metric: str
    value: float
    float_value: float
    budget: float
    evaluations: int
    is_least: bool
    size: int
    float_size: int
    bops: float

    def __str__(self) -> str:
        """What changes, and what it costs."""
        least = "no cheaper candidate does" if self.is_least else "not all cheaper ones were tried"
        lines = [
            f"{self.metric} {self.value:.4g} (float {self.float_value:.4g}, budget "
            f"{self.budget:g}), {self.evaluations} evaluations; {least}",
            f"  weights {self.size:,} bytes of {self.float_size:,}, BOPs {100 * self.bops:.1f} % "
            "of float",
        ]
        for layer, bits in self.changes.items():
            lines.append(f"  {layer}: {'float' if bits is None else f'{bits} bits'}")
        return "\n".join(lines if self.changes else [*lines, "  the recipe as it is"])


class BudgetNotMet(ValueError):
    """No candidate keeps the budget.

    Args:
        message: Why.
        best: The best candidate that was measured.
    """

    def __init__(self, message: str, best: Suggestion) -> None:
        super().__init__(message)
        self.best = best


def suggest(
    result: Sensitivity,
    budget: float,
    *,
    choices: Sequence[int | None] = (),
    minimize: Minimize | None = None,
    most_evaluations: int = 256,
) -> Suggestion:
    """The cheapest recipe that keeps a metric within a budget.

    Candidates are measured. Layers are first improved in the order of the result's ranking until
    the budget is met, then each improvement is taken back if it is not needed. Where few enough
    candidates are cheaper still, all of them are measured, so that the result is the cheapest.

    Args:
        result: What ``sensitivity`` has just returned; one that was loaded cannot measure.
        budget: How far the metric may be below the float model's, in its own unit (``0.01`` of an
            accuracy); with ``metric="sqnr"`` the least ratio in decibels, with ``"kl"`` the most
            nats.
        choices: Bits that the weight of a layer may have, ``None`` for float. By default those
            that the result has measured; else the recipe's own, and 8 where these are fewer, or
            float.
        minimize: ``layers``: how many differ from the recipe that was measured; ``size``: bytes of
            weights; ``bops``: bit operations. By default ``layers``, or ``size`` where a choice has
            fewer bits than the recipe.
        most_evaluations: How many cheaper candidates are measured at most, to see that none of
            them does.

    Raises:
        BudgetNotMet: Not even the most precise choice for all layers keeps it; ``best`` has the
            best candidate.
        ValueError: The result was loaded, or a choice is none.
    """
    candidates = result.candidates
    if candidates is None:
        raise ValueError(
            "suggest measures candidates, and a result that was loaded has no model. Call "
            "sensitivity with the same arguments and resume= this file: it measures no layer again."
        )
    offered = _offered(result, choices)
    minimize = _objective(result, offered, minimize)
    sizes = {s.layer: s for s in result.sizes if s.layer not in result.never_run}
    ladders = Ladders(
        {layer: _ladder(size, offered, minimize) for layer, size in sizes.items()},
        lambda layer, bits: _expense(sizes[layer], bits, minimize),
        _predicted(result),
    )

    tried: list[dict[str, Choice]] = []

    def is_good(assignment: dict[str, Choice]) -> bool:
        tried.append(assignment)
        value = _value(candidates, assignment)
        return candidates.metric.is_within(value, result.float_value, budget)

    def drop(assignment: dict[str, Choice]) -> float:
        return candidates.metric.drop(_value(candidates, assignment), result.float_value)

    before = candidates.measured
    found = search(ladders, is_good, most_evaluations)
    chosen = found.assignment or min(tried, key=drop)
    suggestion = _suggestion(result, chosen, budget, before, is_least=found.is_least)
    if found.assignment is None or all(bits is None for bits in chosen.values()):
        raise BudgetNotMet(_why_not(result, suggestion, ladders), suggestion)
    return suggestion


def _offered(result: Sensitivity, choices: Sequence[int | None]) -> tuple[int | None, ...]:
    """The choices in the order of precision."""
    wrong = [c for c in choices if not (c is None or (type(c) is int and 2 <= c <= 8))]
    if wrong:
        raise ValueError(f"choices must be ints from 2 to 8, or None for float; got {wrong[0]!r}.")
    layers = {size.layer for size in result.sizes}
    measured = {row.bits for row in result.rows if row.layer in layers}
    own = {size.bits for size in result.sizes}
    if not choices:
        more = measured if not measured <= own else {8} if min(own, default=8) < 8 else {None}
        choices = (*own, *more)
    return tuple(sorted(set(choices), key=_precision))


def _objective(
    result: Sensitivity, offered: Sequence[int | None], minimize: Minimize | None
) -> Minimize:
    if minimize not in (None, "layers", "size", "bops"):
        raise ValueError(f"minimize must be 'layers', 'size' or 'bops'; got {minimize!r}.")
    lowest = min((size.bits for size in result.sizes), default=2)
    fewer = any(bits is not None and bits < lowest for bits in offered)
    return minimize or ("size" if fewer else "layers")


def _ladder(
    size: LayerSize, offered: Sequence[int | None], minimize: Minimize
) -> tuple[int | None, ...]:
    if minimize != "layers":
        return tuple(offered)
    return (size.bits, *(bits for bits in offered if _precision(bits) > size.bits))


def _precision(bits: Choice) -> int:
    return _FLOAT_BITS if bits is None else bits


def _bops(size: LayerSize, bits: Choice) -> float:
    if bits is None:
        return size.multiplications * _FLOAT_BITS**2
    input_bits = size.input_bits if bits == size.bits else max(size.input_bits, bits)
    return size.multiplications * bits * input_bits


def _expense(size: LayerSize, bits: Choice, minimize: Minimize) -> float:
    if minimize == "layers":
        return float(bits != size.bits)
    return size.weights * _precision(bits) / 8 if minimize == "size" else _bops(size, bits)


def _predicted(result: Sensitivity) -> Callable[[str, Choice], float]:
    """What the measurements say a choice costs: exactly so many bits, or the next fewer."""
    drops: dict[str, dict[int, float]] = {}
    for row in result.rows:
        drops.setdefault(row.layer, {})[row.bits] = row.drop

    def predicted(layer: str, bits: Choice) -> float:
        measured = drops.get(layer, {})
        # More bits than any that were measured cost next to nothing beside them.
        return measured.get(bits, 0.0) if bits is not None else 0.0

    return predicted


def _value(candidates: Candidates, assignment: Mapping[str, Choice]) -> float:
    changed = {
        layer: bits
        for layer, bits in assignment.items()
        if bits != candidates.everything().get(layer)
    }
    return candidates.measure(candidates.everything() | changed, f"a candidate with {changed}")


def _suggestion(
    result: Sensitivity,
    assignment: Mapping[str, Choice],
    budget: float,
    before: int,
    *,
    is_least: bool,
) -> Suggestion:
    candidates = result.candidates
    assert candidates is not None
    chosen = {size.layer: size.bits for size in result.sizes} | dict(assignment)
    changes = {s.layer: chosen[s.layer] for s in result.sizes if chosen[s.layer] != s.bits}
    value = _value(candidates, assignment)
    float_bops = sum(_bops(size, None) for size in result.sizes)
    return Suggestion(
        recipe=_with_changes(result, changes),
        changes=changes,
        metric=result.metric,
        value=value,
        float_value=result.float_value,
        budget=budget,
        evaluations=candidates.measured - before,
        is_least=is_least,
        size=int(sum(_expense(s, chosen[s.layer], "size") for s in result.sizes)),
        float_size=sum(4 * size.weights for size in result.sizes),
        bops=sum(_bops(s, chosen[s.layer]) for s in result.sizes) / max(1.0, float_bops),
    )


def _with_changes(result: Sensitivity, changes: Mapping[str, Choice]) -> Recipe:
    """The recipe with an override for each layer that changes; what else it says of it stays."""
    recipe = Recipe.from_dict(result.recipe)
    overrides: dict[str, Any] = dict(recipe.overrides)
    sizes = {size.layer: size for size in result.sizes}
    for layer, bits in changes.items():
        earlier = overrides.pop(glob.escape(layer), None) or {}
        if bits is not None:
            inputs = max(sizes[layer].input_bits, bits)
            wanted: Any = {"weight": {"bits": bits}, "activation": {"bits": inputs}}
            earlier = {k: {**earlier.get(k, {}), **wanted[k]} for k in ("weight", "activation")}
        overrides[glob.escape(layer)] = None if bits is None else earlier
    return replace(recipe, overrides=overrides)


def _why_not(result: Sensitivity, best: Suggestion, ladders: Ladders) -> str:
    how = "cannot be met" if best.is_least else "is not met by any candidate that was measured"
    text = (
        f"The budget of {best.budget:g} {how}; the best of them gives {best.metric} "
        f"{best.value:.4g}, of float {best.float_value:.4g}"
    )
    if not any(None in choices for choices in ladders.choices.values()):
        return f"{text}. Offer choices of more bits, or None for float: choices=(8, None)."
    if all(bits is None for bits in {**ladders.at(ladders.lowest()), **best.changes}.values()):
        text += ", with no layer quantized"
    layers = {size.layer for size in result.sizes}
    rest = [row.layer for row in result.ranking if row.layer not in layers and row.drop > 0]
    if rest:
        text += (
            f". Of what is quantized between layers {rest[0]!r} costs most; joins=False and "
            "outputs=False in the recipe leave that float, and more bits of activations help"
        )
    return f"{text}. Training with the recipe may win back the rest."
