"""From a trained QAT model to final numbers in one graph. The live model is never touched."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_qat.convert.capture import capture_program, export_program
from lightning_qat.convert.finalize import (
    finalized_copy,
    refuse_broken_constants,
    refuse_unknown_ranges,
)
from lightning_qat.convert.fold_batchnorm import fold_batchnorms
from lightning_qat.convert.needed_inputs import keep_outputs, output_slots
from lightning_qat.convert.recurrences import mark_recurrences, take_recurrences
from lightning_qat.convert.rewrites.drop_dropout import drop_dropout, drop_single_cat
from lightning_qat.convert.rewrites.fit_biases import fit_biases
from lightning_qat.convert.rewrites.fold_constants import fold_constant_layers, fold_constants
from lightning_qat.convert.rewrites.merge_quantizations import merge_quantizations
from lightning_qat.convert.rewrites.products import products_as_layers
from lightning_qat.convert.untrained import untrained_copy
from lightning_qat.ir.exported_program import clean_up
from lightning_qat.ir.make_functional import make_functional
from lightning_qat.ir.ops import key_of
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.containers import without_dataclasses
from lightning_qat.model.inputs import Inputs, as_call
from lightning_qat.out_of_memory import EXPORT_LATER, naming_memory_errors
from lightning_qat.quantizers.final import FinalActivation, FinalWeight, UnknownRange
from lightning_qat.recipe.recipe import Recipe

WAY_ON = (
    "Give it a smaller example batch, or free memory: it works on a copy on the CPU. "
    + EXPORT_LATER
)

PASSES = (
    fold_constants,
    lambda program: make_functional(program.graph),
    drop_dropout,
    drop_single_cat,
    merge_quantizations,
    products_as_layers,
)
"""Rewrites of the captured graph, in place, in this order; batch norm is folded after them.

Dropout and single ``cat`` go first: without them in between, quantizations repeat each other, and a
batch norm stands right behind its layer.
"""


@naming_memory_errors(
    "converting the model",
    WAY_ON,
)
def convert(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    recipe: Recipe | None = None,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    export_outputs: Sequence[str] | None = None,
) -> QuantizedModel:
    """Make the numbers of a trained QAT model final and capture its graph.

    Works on a deep copy on the CPU in eval mode: integers are rounded once, batch norm is folded
    into the layer before it, and ``torch.export`` (non-strict) captures ``forward``. The size of
    the first dimension that the inputs share is kept dynamic where the model allows it; of a model
    with recurrent layers that of the second, where that is the batch. Their loop over time steps
    is unrolled for the length of the example. An input that no output needs is left out.

    Args:
        model: A model that ``prepare`` changed and that has seen training batches.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments, nested as it likes.
        recipe: The recipe, kept in the result for the record.
        dynamic_batch: False gives every dimension the size that it has in ``example_inputs``.
        dynamic_shapes: Which dimensions are dynamic, as ``torch.export.export`` takes them:
            ``{"x": {0: Dim.AUTO, 2: Dim.AUTO}}``; all others are fixed. By default the batch alone.
        export_outputs: Names of the outputs to keep, as ``output_names`` of the result has them;
            with the others go the inputs that only they need, such as labels for a loss. By
            default all.

    Returns:
        The converted model, which exporters read. In the place of outputs that are left out it
        returns ``None``; inputs that are left out it takes and ignores.

    Raises:
        ValueError: The model has no QAT layers, or its forward runs layers whose range was never
            observed, or some weights, biases or statistics of batch norm are not finite; all of
            them are named. ``export_outputs``
            names no output.
        OutOfMemory: Memory ran out; the message says how to go on.
        CaptureError: ``forward`` cannot be captured; the message says in which module and line.
    """
    args, kwargs = as_call(example_inputs)
    final = finalized_copy(model, args, kwargs)
    return _converted(final, example_inputs, recipe, dynamic_batch, dynamic_shapes, export_outputs)


@naming_memory_errors(
    "converting the model for a trial",
    WAY_ON,
)
def convert_untrained(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    export_outputs: Sequence[str] | None = None,
) -> QuantizedModel:
    """Convert a model that is not trained yet, with made-up numbers: a trial before training.

    Args:
        model: A prepared model; it is not changed, and need not be calibrated.
        example_inputs: As for ``convert``.
        dynamic_batch: As for ``convert``.
        dynamic_shapes: As for ``convert``.
        export_outputs: As for ``convert``.

    Returns:
        A model with the graph that ``convert`` will capture after training. Its numbers mean
        nothing: ranges that are not known yet are -1 to 1.

    Raises:
        ValueError: As ``convert``, of what is known before training.
        CaptureError: As ``convert``.
    """
    final = untrained_copy(model, *as_call(example_inputs))
    return _converted(final, example_inputs, None, dynamic_batch, dynamic_shapes, export_outputs)


def _converted(
    final: nn.Module,
    example_inputs: Inputs,
    recipe: Recipe | None,
    dynamic_batch: bool,
    dynamic_shapes: Any,
    export_outputs: Sequence[str] | None,
) -> QuantizedModel:
    """Capture a copy whose quantizers hold final numbers, and clean its graph up."""
    args, kwargs = as_call(example_inputs)
    mark_recurrences(final)
    # torch.export does not look into them.
    final.register_forward_hook(lambda _module, _args, output: without_dataclasses(output))
    if dynamic_shapes is None and dynamic_batch:
        program = capture_program(final, args, kwargs)
    else:
        program = export_program(final, args, kwargs, dynamic_shapes)
    refuse_unknown_ranges(final)
    refuse_broken_constants(program)
    unreached = _unreached(final, program)
    keep_outputs(program, export_outputs)
    for rewrite in PASSES:
        rewrite(program)
    saturated = fold_batchnorms(program)
    for key, count in saturated.items():
        warnings.warn(
            f"{key}: {count} integers of the folded weight saturate at 127, because the batch "
            "norm after it has negative factors and the grid -128..127 has no +128. The recipe's "
            "quantizer='minmax' folds exactly.",
            stacklevel=2,
        )
    fit_biases(program)
    recurrences = take_recurrences(program, final)
    constant_layers = fold_constant_layers(program, {call.name for call in recurrences})
    clean_up(program)
    return QuantizedModel(
        program,
        _input_names(program),
        _output_names(program),
        {} if recipe is None else recipe.to_dict(),
        recurrences,
        unreached,
        constant_layers,
    )


@naming_memory_errors(
    "trying whether the model can be captured",
    WAY_ON,
)
def check_capture(model: nn.Module, example_inputs: Inputs) -> None:
    """Find out before training whether ``convert`` will be able to capture the model.

    Args:
        model: A prepared model; it need not be calibrated.
        example_inputs: As for ``convert``.

    Raises:
        CaptureError: It will not; the message says in which module and line.
    """
    args, kwargs = as_call(example_inputs)
    capture_program(untrained_copy(model, args, kwargs), args, kwargs)


_FINAL = (FinalActivation, FinalWeight, UnknownRange)


def _unreached(final: nn.Module, program: ExportedProgram) -> tuple[str, ...]:
    """Keys of the tensors that a model would quantize, and its captured graph does not."""
    keys = [m.key for m in final.modules() if isinstance(m, _FINAL)]
    reached = {key_of(node) for node in program.graph.nodes}
    return tuple(key for key in dict.fromkeys(keys) if key not in reached)


def _input_names(program: ExportedProgram) -> tuple[str, ...]:
    tensors = {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    return tuple(str(n) for n in program.graph_signature.user_inputs if n in tensors)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names from where a tensor stands in the output: ``logits``, ``boxes_0``, or ``output``."""
    # Runtimes tell inputs and outputs apart by name.
    taken, names = set(_input_names(program)), []
    for slot in output_slots(program):
        name = "_".join(slot.path) or "output"
        if name[0].isdigit() or name in taken:
            name = f"output_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)
