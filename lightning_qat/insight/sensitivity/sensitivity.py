"""Quantize one layer at a time, or all but one, and measure what it costs."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qat.calibrate.batches import (
    as_batches,
    observe,
    recorded_calls,
    run_batch,
    without_range,
)
from lightning_qat.insight.sensitivity.candidates import Candidates
from lightning_qat.insight.sensitivity.metrics import OUTPUT_METRICS, Evaluate, Metric, UserMetric
from lightning_qat.insight.sensitivity.result import LayerSize, Sensitivity, SensitivityRow
from lightning_qat.insight.sensitivity.switched_model import Choice, SwitchedModel, Unit
from lightning_qat.insight.sensitivity.unchanged import Unchanged, digest, digest_of
from lightning_qat.joins.apply import plan_of
from lightning_qat.model.inputs import Call, Inputs
from lightning_qat.model.paths import ModelPaths
from lightning_qat.model.torch_compile import unwrapped
from lightning_qat.out_of_memory import naming_memory_errors
from lightning_qat.prepare.prepare import prepare
from lightning_qat.prepare.swap import choose_layers, end_layers
from lightning_qat.quantizers.base import Quantizer
from lightning_qat.recipe.recipe import Recipe
from lightning_qat.training.range_sync import activation_quantizers


@naming_memory_errors(
    "measuring sensitivity",
    "Give it smaller or fewer batches. What was measured is kept where path= was given, and the "
    "same call goes on from there",
)
def sensitivity(
    model: nn.Module,
    recipe: Recipe | Mapping[str, Any] | str | Path = "int8",
    evaluate: Evaluate | None = None,
    *,
    data: Any = None,
    metric: Literal["sqnr", "kl"] = "sqnr",
    mode: Literal["only", "all_but"] = "only",
    bits: Sequence[int] = (),
    example_inputs: Inputs | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """What quantizing each layer costs, measured one layer at a time.

    A layer is its input and its weight; a tensor between layers that no layer reads (the operands
    of an addition, the model's outputs) has a row of its own. The model is copied and never
    changed. Measured are the float model, the model with everything quantized, and one row per
    layer and number of bits.

    Args:
        model: A float model, which is prepared and calibrated here, or one that ``prepare`` has
            changed, with the ranges that it has.
        recipe: How layers are quantized; of a prepared model the one it was prepared with.
        evaluate: A model to one number, higher is better: ``lambda m: -loss(m)`` for a loss. By
            default the outputs on ``data`` are compared with float's.
        data: Batches of what ``forward`` takes, for calibration and comparison. They are kept in
            memory. By default the first calls of ``forward`` in ``evaluate`` calibrate.
        metric: Without ``evaluate``: ``sqnr``, the outputs' signal to noise ratio in decibels, or
            ``kl``, the divergence of their softmax over the last axis in nats.
        mode: ``only`` this layer is quantized, or ``all_but`` this one.
        bits: Numbers of bits that each weight is measured with, such as ``(8, 4, 2)``; by default
            the recipe's own. An input has the recipe's bits, and no fewer than its weight.
        example_inputs: What ``forward`` takes, to plan the tensors between layers; by default the
            first of ``data``.
        resume: A JSON file that keeps each measurement as it is made. A later call with the same
            model, recipe and data goes on where it ends; ``Sensitivity.load`` reads it.
        progress: Show a progress bar.

    Returns:
        The measurements. ``suggest`` makes a recipe of them.

    Raises:
        ValueError: There is nothing to quantize, the data are empty or miss a layer, the metric is
            NaN, ``evaluate`` changes the model, or ``resume`` is of another model.
        TypeError: ``evaluate`` returns no number.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> result = sensitivity(model, "int8", data=[torch.randn(16, 4)], progress=False)
        >>> [row.layer for row in result.rows]
        ['0', '2', '2.output_0_0']
    """
    _check(evaluate, data, metric, mode, bits)
    recipe = Recipe.load(recipe)
    own = _copied(model).eval()
    unchanged = Unchanged(own)
    batches: Sequence[Call] | None = None if data is None else as_batches(data)
    if batches is None:
        assert evaluate is not None
        batches = _recorded(own, UserMetric(evaluate), unchanged)
    fingerprint = _fingerprint(own, recipe, data is not None, batches, (mode, *bits))
    measured: Metric
    measured = OUTPUT_METRICS[metric](batches) if evaluate is None else UserMetric(evaluate)
    example = batches[0] if example_inputs is None else example_inputs
    resolved = recipe
    if recipe.first_last is not None:
        resolved = recipe.with_ends(end_layers(own, ModelPaths.of(own), example))
    _quantize(own, recipe, resolved, batches, example)
    candidates = Candidates(SwitchedModel(own, batches, resolved), measured, unchanged)
    empty = _framed(candidates, recipe, mode, f"{fingerprint} {measured.name}")
    return _measured(candidates, empty, tuple(bits), resume, progress)


def _measured(
    candidates: Candidates,
    empty: Sensitivity,
    bits: tuple[int, ...],
    resume: str | Path | None,
    progress: bool,
) -> Sensitivity:
    """Fill a result with rows, one evaluation each, but for those that a file holds."""
    known = {} if resume is None else _known_rows(Path(resume), empty)
    work = [
        (unit, number)
        for unit in candidates.switched.units
        if unit.name not in empty.never_run
        for number in (bits if unit.is_layer and bits else (unit.bits,))
    ]
    rows: list[SensitivityRow] = []
    bar = tqdm(work, desc="sensitivity", unit="layer", disable=not progress, leave=False)
    for unit, number in bar:
        row = known.get((unit.name, number))
        if row is None:
            row = _row(candidates, empty, unit, number)
        rows.append(row)
        if resume is not None and row is not known.get((unit.name, number)):
            rest = [r for r in known.values() if r not in rows]
            replace(empty, rows=(*rows, *rest)).save(resume)
    return replace(empty, rows=tuple(rows))


def _row(candidates: Candidates, empty: Sensitivity, unit: Unit, bits: int) -> SensitivityRow:
    metric, of_float = candidates.metric, empty.float_value
    assignment: dict[str, Choice] = {unit.name: bits}
    if empty.mode == "only":
        value = candidates.measure(assignment, f"only {unit.name!r} quantized")
        drop = metric.drop(value, of_float)
    else:
        everything = candidates.everything()
        value = candidates.measure(everything | {unit.name: None}, f"all but {unit.name!r}")
        whole = candidates.measure(everything | assignment, f"all, {unit.name!r} of {bits} bits")
        drop = metric.drop(whole, of_float) - metric.drop(value, of_float)
    return SensitivityRow(unit.name, unit.kind, bits, unit.input_bits_at(bits), value, drop)


def _framed(candidates: Candidates, recipe: Recipe, mode: str, fingerprint: str) -> Sensitivity:
    """A result without rows: the float model and the quantized one."""
    switched = candidates.switched
    of_float = candidates.measure({}, "the float model")
    stop = switched.watch_calls()
    try:
        quantized = candidates.measure(candidates.everything(), "everything quantized")
    finally:
        stop()
    sizes = tuple(
        LayerSize(u.name, u.bits, u.input_bits, u.weights, switched.calls.get(u.name, 0))
        for u in switched.units
        if u.is_layer
    )
    return Sensitivity(
        rows=(),
        metric=candidates.metric.name,
        mode=mode,
        recipe=recipe.to_dict(),
        float_value=of_float,
        quantized_value=quantized,
        sizes=sizes,
        never_run=switched.never_run(),
        fingerprint=fingerprint,
        candidates=candidates,
    )


def _known_rows(path: Path, empty: Sensitivity) -> dict[tuple[str, int], SensitivityRow]:
    """The measurements that a file holds.

    Raises:
        ValueError: They are of another model, or ``evaluate`` gives other values by now.
    """
    if not path.exists():
        return {}
    found = Sensitivity.load(path)
    if found.fingerprint != empty.fingerprint:
        raise ValueError(
            f"{str(path)!r} holds measurements of another model, recipe, mode or data. Give the "
            "arguments of the run that wrote it, or another path as resume=."
        )
    for name in ("float_value", "quantized_value"):
        before, now = getattr(found, name), getattr(empty, name)
        if before != now and not math.isclose(before, now, rel_tol=1e-4, abs_tol=1e-6):
            raise ValueError(
                f"{str(path)!r} was measured where {name} was {before}; evaluate gives {now} now. "
                "Evaluate on the same samples every time, or give another path as resume=."
            )
    return {(row.layer, row.bits): row for row in found.rows}


def _check(evaluate: object, data: object, metric: object, mode: object, bits: Any) -> None:
    if evaluate is None and data is None:
        raise ValueError(
            "sensitivity needs something to measure: evaluate=, a function of a model that returns "
            "one number, or data=, batches of what forward takes."
        )
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of a model; got {type(evaluate).__name__}.")
    if mode not in ("only", "all_but"):
        raise ValueError(f"mode must be 'only' or 'all_but'; got {mode!r}.")
    if metric not in OUTPUT_METRICS:
        raise ValueError(f"metric must be one of {sorted(OUTPUT_METRICS)}; got {metric!r}.")
    if isinstance(bits, int) or not all(isinstance(b, int) and 2 <= b <= 8 for b in bits):
        raise ValueError(f"bits must be ints from 2 to 8, such as (8, 4, 2); got {bits!r}.")


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy, without what ``torch.compile`` put around it; a Trainer is not copied."""
    model = unwrapped(model)
    memo: dict[int, Any] = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    for name in ("_trainer", "_fabric"):
        owner = vars(model).get(name)
        if owner is not None:
            memo[id(owner)] = owner
    return copy.deepcopy(model, memo)


def _recorded(model: nn.Module, metric: UserMetric, unchanged: Unchanged) -> list[Call]:
    """What ``evaluate`` gives to the model's ``forward``, to calibrate with."""
    calls: list[Call] = []
    with recorded_calls(model, calls), torch.no_grad():
        metric.measure(model)
    unchanged.check(model)
    if not calls:
        raise ValueError(
            f"evaluate never calls {type(model).__name__} itself, so there is nothing to calibrate "
            "with. Call model(x) in evaluate, or pass data=, batches of what forward takes."
        )
    return calls


def _quantize(
    own: nn.Module, recipe: Recipe, resolved: Recipe, batches: Sequence[Call], example: Inputs
) -> None:
    """Prepare and calibrate a copy, or check that it is a prepared, calibrated one."""
    prepared = any(isinstance(module, Quantizer) for module in own.modules())
    # A clear error for data that forward does not take.
    run_batch(own, batches[0])
    if prepared:
        _refuse_other_recipe(own, resolved)
    if not prepared or (plan_of(own) is None and (recipe.joins or recipe.outputs)):
        prepare(own, recipe, example)
    ranges = [q.calibrated for q in activation_quantizers(own).values() if q.follows_data]
    if not prepared or not any(q.calibrated for q in activation_quantizers(own).values()):
        observe(own, batches)
        missing = without_range(own)
        remedy = "Pass data that reach them"
    else:
        missing = without_range(own) if ranges else []
        remedy = "Call calibrate_unseen(model, inputs) before"
    if missing:
        raise ValueError(
            f"Every quantized tensor must have a range; no batch has passed through {missing}. "
            f"{remedy}, or exclude these layers in the recipe."
        )


def _refuse_other_recipe(own: nn.Module, recipe: Recipe) -> None:
    skipped = choose_layers(ModelPaths.of(own), recipe, check_patterns=False).skipped
    other = [s for s in skipped if "with another recipe" in s.reason]
    if other:
        raise ValueError(
            f"recipe must be the one that the model was prepared with; {other[0].name!r} is "
            f"{other[0].reason.partition('; start from')[0]}. Pass recipe=, or the float model."
        )


def _fingerprint(
    model: nn.Module, recipe: Recipe, has_data: bool, batches: Sequence[Call], rest: object
) -> str:
    """A digest of what the measurements depend on; of ``evaluate`` nothing can be told."""
    found = hashlib.blake2b(digest_size=16)
    found.update(digest_of(model).encode())
    found.update(json.dumps([recipe.to_dict(), rest], sort_keys=True).encode())
    for tensor in _tensors(batches) if has_data else ():
        found.update(digest(tensor).encode())
    return found.hexdigest()


def _tensors(batches: Sequence[Call]) -> Iterator[Tensor]:
    for batch in batches:
        yield from (x for x in pytree.tree_leaves(tuple(batch)) if isinstance(x, Tensor))
