"""Proof that a file computes what was trained: its numbers read back, its outputs compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_qat.export.cautions import cautions
from lightning_qat.export.compare.file import compare_file
from lightning_qat.export.load import load_exporter
from lightning_qat.export.other_batch import OtherBatch
from lightning_qat.export.protocol import (
    Array,
    Artifact,
    CannotRun,
    Explaining,
    Exporter,
    Readable,
    Runnable,
    as_arrays,
)
from lightning_qat.export.trace import Traceable
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs, as_call, first_samples
from lightning_qat.out_of_memory import naming_memory_errors

_EXPLAINED = 1.5
"""More steps than this are looked into: one is a rounding that fell the other way."""
_SAMPLES = 8
"""So many samples are enough to find a layer that is wrong."""


@dataclass(frozen=True)
class OutputAgreement:
    """How far one output of one runtime is from the converted model in torch.

    Args:
        output: Name of the output.
        step: The unit of the ``_steps`` figures: the scale of a quantized output, else 1/255 of
            the range that the reference takes on these inputs.
        max_steps: Largest difference, in steps.
        mean_steps: Mean difference, in steps.
        max_abs: Largest difference.
        fraction_differing: Share of elements more than half a step away.
        same_argmax: Share of rows (last axis) with the same largest element; ``None`` where the
            last axis has one element or none.
        one_argmax: The largest element of the reference has the same place in every row, so that
            ``same_argmax`` says little.
    """

    output: str
    step: float
    max_steps: float
    mean_steps: float
    max_abs: float
    fraction_differing: float
    same_argmax: float | None
    one_argmax: bool = False


@dataclass(frozen=True)
class RuntimeAgreement:
    """All outputs of one runtime."""

    runtime: str
    outputs: tuple[OutputAgreement, ...]

    @property
    def max_steps(self) -> float:
        """The largest difference of any output, in steps."""
        return max((o.max_steps for o in self.outputs), default=0.0)


@dataclass(frozen=True)
class Agreement:
    """How far an artifact is from the model it was made of. ``print`` shows a table.

    Args:
        target: Name of the exporter.
        parameter_differences: Every number in the files that is not the model's, in words; empty
            when all are equal to the bit. ``None``: this target's files cannot be read back.
        runtimes: One entry per runtime the files were run in; empty where none exists.
        samples: Size of the batch that was run.
        remarks: What the exporter knows to be behind a difference.
        source: Where the samples are from, in words.
        cautions: Why the agreement says less than it seems to: few samples, equal ones, outputs
            that never change, a file that does not take another batch.
        judgement: Which layer is behind a difference of more than one rounding, or that none is
            wrong by itself; empty where there is no such difference, or the target shows no
            tensors.
    """

    target: str
    parameter_differences: tuple[str, ...] | None
    runtimes: tuple[RuntimeAgreement, ...]
    samples: int
    remarks: tuple[str, ...] = ()
    source: str = ""
    cautions: tuple[str, ...] = ()
    judgement: str = ""

    @property
    def parameters_equal(self) -> bool:
        """Whether every scale, zero point and integer was read back and is the model's."""
        return self.parameter_differences == ()

    @property
    def max_steps(self) -> float:
        """The largest difference in the most literal runtime, in steps."""
        return self.runtimes[0].max_steps if self.runtimes else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Primitives, for the manifest."""
        return {**asdict(self), "parameters_equal": self.parameters_equal}

    def __str__(self) -> str:
        """One line on the numbers, one per output and runtime."""
        if self.parameter_differences is None:
            numbers = "numbers cannot be read back"
        elif self.parameters_equal:
            numbers = "numbers equal to the bit"
        else:
            numbers = f"{len(self.parameter_differences)} numbers differ"
        source = f" ({self.source})" if self.source else ""
        lines = [f"{self.target}: {numbers}; {self.samples} samples{source}"]
        lines += [f"  {difference}" for difference in (self.parameter_differences or ())[:10]]
        for runtime in self.runtimes:
            for o in runtime.outputs:
                same = "" if o.same_argmax is None else f", argmax equal {o.same_argmax:.2%}"
                same += " (always the same one)" if o.one_argmax else ""
                lines.append(
                    f"  {runtime.runtime}, {o.output}: max {o.max_steps:.3g} steps "
                    f"({o.max_abs:.3g}), mean {o.mean_steps:.2g} steps, "
                    f"{o.fraction_differing:.2%} differ{same}"
                )
        remarks = [*self.remarks, self.judgement, *(f"Caution: {text}" for text in self.cautions)]
        return "\n".join([*lines, *(f"  {remark}" for remark in remarks if remark)])


@naming_memory_errors(
    "comparing a file with the model",
    "The file is written. Compare it with fewer inputs (verify(..., inputs=...)), or later, "
    "where there is more memory: lightning-qat verify",
)
def verify(
    model: QuantizedModel,
    artifact: Artifact,
    inputs: Inputs | None = None,
    exporter: Exporter | None = None,
    *,
    source: str | None = None,
) -> Agreement:
    """Read an artifact's numbers back and run it where a runtime exists.

    Args:
        model: The converted model the artifact was made of: the reference.
        artifact: What ``export`` returned.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments; the model's
            example inputs by default. Real data tell more than noise.
        exporter: The exporter that wrote it, when it has options; found by name otherwise.
        source: Where the inputs are from, in words; for the agreement.

    Returns:
        The agreement. Disagreement is reported, not raised.

    Raises:
        TypeError: ``model`` is not a converted model.
        ValueError: The inputs do not fit the model.
    """
    if not isinstance(model, QuantizedModel):
        raise TypeError(
            f"verify takes a QuantizedModel; got {type(model).__name__}. Call "
            "convert(model, example_inputs) first."
        )
    target = exporter or load_exporter(artifact.target)
    args, kwargs = model.example_inputs if inputs is None else as_call(inputs)
    reference = as_arrays(model.flat_outputs(model(*args, **kwargs)))
    arrays = as_arrays(model.flat_inputs(args, kwargs))
    runtimes = []
    samples = max((len(a) for a in arrays.values() if a.ndim), default=1)
    warned = [*cautions(arrays, reference, samples)]
    if isinstance(target, Runnable):
        other = OtherBatch.of(model, args, kwargs)
        for runtime in target.runtimes:
            try:
                outputs = target.run(artifact, runtime, arrays)
            except CannotRun as refusal:
                warned.append(f"{refusal}")
                continue
            compared = (
                compare_output(name, reference[name], outputs[name], model.output_steps.get(name))
                for name in reference
            )
            runtimes.append(RuntimeAgreement(runtime, tuple(compared)))
            failure = other and other.failure(target, artifact, runtime)
            if other and failure:
                warned.append(
                    f"The batch is dynamic, but with {other.samples} instead of {samples} samples "
                    f"{runtime} fails: {failure}. convert(..., dynamic_batch=False) fixes it."
                )
    differences = None
    if isinstance(target, Readable):
        differences = target.differences(model, artifact)
    remarks: tuple[str, ...] = ()
    if isinstance(target, Explaining):
        remarks = target.explain({r.runtime: r.max_steps for r in runtimes})
    judgement = ""
    if isinstance(target, Traceable):
        steps = {r.runtime: r.max_steps for r in runtimes}.get(target.traced_runtime, 0.0)
        if differences or steps > _EXPLAINED:
            judgement = _first_departure(model, artifact, target, args, kwargs)
    if source is None:
        source = "the example inputs" if inputs is None else "the given inputs"
    return Agreement(
        artifact.target,
        differences,
        tuple(runtimes),
        samples,
        remarks,
        source,
        tuple(warned),
        judgement,
    )


def _first_departure(
    model: QuantizedModel,
    artifact: Artifact,
    target: Exporter,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> str:
    """Which layer is behind a difference, of a target that shows its tensors."""
    args, kwargs = first_samples((args, kwargs), _SAMPLES)
    try:
        return compare_file(model, artifact, target, args, kwargs).judgement
    except (CannotRun, ValueError) as error:
        return f"Layers could not be compared one by one: {error}"


def compare_output(
    name: str, reference: Array, output: Array, step: float | None = None
) -> OutputAgreement:
    """Compare one output with its reference.

    Args:
        name: Name of the output.
        reference: What the converted model computes.
        output: What a file computes, the same shape.
        step: The output's quantization step; 1/255 of the reference's range by default.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> compare_output("y", np.array([0.0, 255.0]), np.array([0.0, 254.0])).max_steps
        1.0
    """
    if reference.shape != output.shape:
        raise ValueError(
            f"Output {name!r} must have shape {reference.shape}; the file gives {output.shape}."
        )
    if not reference.size:
        return OutputAgreement(name, 0.0, 0.0, 0.0, 0.0, 0.0, None)
    difference = np.abs(reference.astype(np.float64) - output.astype(np.float64))
    if step is None:
        step = float(np.ptp(reference.astype(np.float64))) / 255.0
    # A constant output has no range; count its differences as they are.
    steps = difference / step if step > 0 else difference
    same, places = None, reference.argmax(-1) if reference.ndim else np.zeros(())
    if reference.ndim > 1 and reference.shape[-1] > 1:
        same = float(np.mean(places == output.argmax(-1)))
    return OutputAgreement(
        name,
        step,
        float(steps.max()),
        float(steps.mean()),
        float(difference.max()),
        float(np.mean(steps > 0.5)),
        same,
        same is not None and places.size > 1 and bool((places == places.flat[0]).all()),
    )
