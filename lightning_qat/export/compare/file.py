"""Compare a file with the converted model that it was made of, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_qat.export.compare.align import Match, Wanted, align
from lightning_qat.export.compare.comparison import ComparedTensor, Comparison
from lightning_qat.export.compare.segments import Segment, segments
from lightning_qat.export.compare.tensor_errors import (
    GridUse,
    TensorErrors,
    grid_use,
    tensor_errors,
)
from lightning_qat.export.protocol import Array, Artifact, Exporter, Readable, as_arrays
from lightning_qat.export.trace import Trace, Traceable
from lightning_qat.ir.quantize_calls import QuantizeCall
from lightning_qat.ir.quantized_model import QuantizedModel

_OFF_GRID = 0.01
"""More elements than this between the steps: the file has another scale or zero point."""


class _Reference(NamedTuple):
    """One run of the converted model."""

    wanted: Sequence[Wanted]
    use: Mapping[str, GridUse]
    outputs: Mapping[str, Array]


def compare_file(
    model: QuantizedModel,
    artifact: Artifact,
    exporter: Exporter,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Comparison:
    """Compare a file with its model; see ``compare``.

    Raises:
        ValueError: The target's files do not show their tensors.
        CannotRun: The file cannot be run so.
    """
    if not isinstance(exporter, Traceable):
        raise ValueError(
            f"The exporter {exporter.name!r} must show the tensors inside its files; it has no "
            "method trace (lightning_qat.export.trace.Traceable). verify compares the outputs."
        )
    reference = _run(model, args, kwargs)
    inputs = as_arrays(model.flat_inputs(args, kwargs))
    accumulated = exporter.trace(artifact, inputs)
    matches = align(reference.wanted, accumulated.tensors)
    given = {m.found.name: m.layout.to_file(m.wanted.values) for m in matches.values()}
    own = exporter.trace(artifact, inputs, given)
    numbers: tuple[str, ...] = ()
    if isinstance(exporter, Readable):
        numbers = exporter.differences(model, artifact)
    rows = _rows(model, reference, accumulated, own, matches, numbers)
    samples = max((len(array) for array in inputs.values() if array.ndim), default=1)
    other = f"{artifact.target} ({exporter.traced_runtime})"
    return Comparison("the converted model", other, samples, tuple(rows), numbers=numbers)


def _run(model: QuantizedModel, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Reference:
    wanted: list[Wanted] = []
    use: dict[str, GridUse] = {}

    def watch(call: QuantizeCall, before: Tensor, after: Tensor) -> None:
        qparams = model.tensors[call.key].qparams
        scale, zero_point = float(qparams.scale), int(qparams.zero_point)
        wanted.append(Wanted(call.name, call.key, scale, zero_point, after.numpy()))
        use[call.name] = grid_use(before.numpy(), qparams)

    outputs = model.watched(args, kwargs, watch)
    return _Reference(wanted, use, as_arrays(outputs))


def _rows(
    model: QuantizedModel,
    reference: _Reference,
    accumulated: Trace,
    own: Trace,
    matches: Mapping[str, Match],
    numbers: Sequence[str],
) -> Iterator[ComparedTensor]:
    made = segments(model)
    alone = {tensor.name: tensor for tensor in own.tensors}
    for one in reference.wanted:
        segment, match = made[one.name], matches.get(one.name)
        total = errors = None
        if match is not None:
            total, errors = (
                tensor_errors(one.values, match.layout.to_model(values), one.scale)
                for values in (match.found.values, alone[match.found.name].values)
            )
        why = _told(segment, one.key, numbers)
        if not why and errors is not None:
            why = _suspicion(errors, _rounding(model, segment, one.scale))
        yield ComparedTensor(one.name, segment.made_by, total, errors, reference.use[one.name], why)
    for name in (name for name in reference.outputs if name in made):
        values = reference.outputs[name]
        step = float(np.ptp(values.astype(np.float64))) / 255 if values.size else 0.0
        total, errors = (
            tensor_errors(values, trace.outputs[name], step) for trace in (accumulated, own)
        )
        why = _told(made[name], name, numbers)
        if not why and step:
            why = _suspicion_of_float(errors, _rounding(model, made[name], step))
        yield ComparedTensor(name, made[name].made_by, total, errors, None, why)


def _told(segment: Segment, key: str, numbers: Sequence[str]) -> str:
    """What was read back of a tensor or of the layers that make it."""
    names = {key, *(layer.name for layer in segment.layers)}
    names |= {layer.weight_key for layer in segment.layers}
    found = [text for text in numbers if text.split(": ")[0] in names]
    return f"Its numbers in the file are not the model's: {'; '.join(found)}." if found else ""


def _rounding(model: QuantizedModel, segment: Segment, step: float) -> float:
    """By how many steps rounded biases move a result: half a step of each accumulator."""
    accumulators = (
        float(model.tensors[layer.input_key].qparams.scale)
        * float(model.tensors[layer.weight_key].qparams.scale.max())
        for layer in segment.layers
    )
    return sum(accumulators) / 2 / step


def _suspicion(own: TensorErrors, rounding: float) -> str:
    """Why the error of a few operators is more than rounding explains.

    A rounding that falls the other way is one step, and a runtime that rounds on two grids, one
    after the other, does so for up to half of the elements: TFLite a layer whose output is read on
    several grids. Rounded biases add ``rounding`` steps.
    """
    if own.fraction_off_grid > _OFF_GRID:
        return (
            f"{own.fraction_off_grid:.0%} of its values lie between the steps of the model's grid: "
            "the file has another scale or zero point for it."
        )
    most = 1.5 + 2 * rounding
    share = 0.5 + 2 * rounding
    if own.max_steps > most or own.fraction_differing > share:
        return (
            f"Given the model's own values, it is up to {own.max_steps:.3g} steps off, "
            f"{own.fraction_differing:.1%} of its values differ; rounding explains {most:.2g} "
            f"steps and {min(share, 1):.0%}."
        )
    return ""


def _suspicion_of_float(own: TensorErrors, rounding: float) -> str:
    """The same of an output that is not quantized: nothing but the biases is rounded."""
    most = 0.05 + 2 * rounding
    if own.max_steps <= most:
        return ""
    return (
        f"Given the model's own values, it is up to {own.max_steps:.3g} of 255 steps of its range "
        f"off; rounding explains {most:.2g}."
    )
