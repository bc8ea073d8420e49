"""From a trained QAT model to final numbers in one graph. The live model is never touched."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.convert.capture import capture_program, export_program
from lightning_qat.convert.drop_dropout import drop_dropout, drop_single_cat
from lightning_qat.convert.finalize import (
    detached_copy,
    finalize_model,
    finalized_copy,
    tensor_keys,
)
from lightning_qat.convert.fold_batchnorm import fold_batchnorms
from lightning_qat.convert.merge_quantizations import merge_quantizations
from lightning_qat.convert.recurrences import mark_recurrences, take_recurrences
from lightning_qat.convert.slice_constants import slice_constants
from lightning_qat.ir.exported_program import clean_up
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.model.inputs import Inputs, as_call
from lightning_qat.recipe.recipe import Recipe

PASSES = (drop_dropout, drop_single_cat, merge_quantizations, slice_constants)
"""Rewrites of the captured graph, in place, in this order; batch norm is folded after them.

Dropout and single ``cat`` go first: without them in between, quantizations repeat each other, and a
batch norm stands right behind its layer.
"""


def convert(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    recipe: Recipe | None = None,
    dynamic_batch: bool = True,
) -> QuantizedModel:
    """Make the numbers of a trained QAT model final and capture its graph.

    Works on a deep copy on the CPU in eval mode: integers are rounded once, batch norm is folded
    into the layer before it, and ``torch.export`` (non-strict) captures ``forward``. The size of
    the first dimension that the inputs share is kept dynamic where the model allows it; of a model
    with recurrent layers that of the second, where that is the batch. Their loop over time steps
    is unrolled for the length of the example.

    Args:
        model: A model that ``prepare`` changed and that has seen training batches.
        example_inputs: What ``forward`` takes: a tensor, a tuple of positional arguments or a
            mapping of keyword arguments, nested as it likes.
        recipe: The recipe, kept in the result for the record.
        dynamic_batch: False gives every dimension the size that it has in ``example_inputs``.

    Returns:
        The converted model, which exporters read.

    Raises:
        ValueError: The model has no QAT layers, or layers whose range was never observed or whose
            weights are not finite; all of them are named.
        CaptureError: ``forward`` cannot be captured; the message says in which module and line.
    """
    args, kwargs = as_call(example_inputs)
    final = finalized_copy(model)
    capture = capture_program if dynamic_batch else partial(export_program, dynamic=None)
    mark_recurrences(final)
    program = capture(final, args, kwargs)
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
    recurrences = take_recurrences(program, final)
    clean_up(program)
    return QuantizedModel(
        program,
        _input_names(program),
        _output_names(program),
        {} if recipe is None else recipe.to_dict(),
        recurrences,
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
    final = detached_copy(model)
    for quantizer in tensor_keys(final):
        quantizer.calibrated = True
    capture_program(finalize_model(final), args, kwargs)


def _input_names(program: ExportedProgram) -> tuple[str, ...]:
    tensors = {
        node.name
        for node in program.graph.nodes
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    }
    return tuple(str(n) for n in program.graph_signature.user_inputs if n in tensors)


def _output_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names from where a tensor stands in the output: ``logits``, ``boxes_0``, or ``output``."""
    out_spec: Any = program.call_spec.out_spec
    values: Any = program.graph.output_node().args[0]
    slots = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    # Runtimes tell inputs and outputs apart by name.
    taken, names = set(_input_names(program)), []
    for path, slot in pytree.tree_flatten_with_path(slots)[0]:
        if not isinstance(values[slot], torch.fx.Node):
            continue
        parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", "")))) for k in path]
        name = "_".join(parts) or "output"
        if name[0].isdigit() or name in taken:
            name = f"output_{name}"
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return tuple(names)
