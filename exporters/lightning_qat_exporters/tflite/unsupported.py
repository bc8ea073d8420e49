"""Find what no TFLite file can express, before anything is converted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightning_qat.export.protocol import Unsupported
from lightning_qat.ir.ops import as_dequantize
from lightning_qat.ir.quantized_model import QuantizedModel, QuantizedTensor

LARGEST_BYTES = 2**31 - 2**20
"""A flatbuffer counts in signed 32 bits; names and operators need some room."""


def problems_of(
    model: QuantizedModel, *, linear_per_tensor: bool, largest: int = LARGEST_BYTES
) -> tuple[Unsupported, ...]:
    """List everything about a model that a file cannot express.

    Args:
        model: The converted model.
        linear_per_tensor: Weights of Linear layers must have one scale.
        largest: How many bytes of constants a file may hold.
    """
    return (
        *_activations(model),
        *_weights(model),
        *(_per_channel_linears(model) if linear_per_tensor else ()),
        *_dynamic_shapes(model),
        *_single_numbers(model),
        *_size(model, largest),
    )


def _activations(model: QuantizedModel) -> Iterator[Unsupported]:
    for key, tensor in model.tensors.items():
        grid = tensor.qparams.grid
        if tensor.kind == "weight" or grid.dtype is torch.int8:
            continue
        if (grid.qmin, grid.qmax) != (-32768, 32767) or bool(tensor.qparams.zero_point.any()):
            yield Unsupported(
                key,
                f"activations of more than 8 bits must be symmetric on all 16 bits; got {grid} "
                f"with zero point {int(tensor.qparams.zero_point)}",
                "Use ActivationSpec(bits=16, symmetric=True) (recipe 'a16w8'), or 8 bits",
            )


def _weights(model: QuantizedModel) -> Iterator[Unsupported]:
    for key, tensor in model.tensors.items():
        if tensor.integers is None:
            continue
        if tensor.integers.dtype is not torch.int8:
            yield Unsupported(
                key,
                f"weights must be integers of 8 or fewer bits; got {tensor.qparams.grid}",
                "Use WeightSpec(bits=8)",
            )


def _per_channel_linears(model: QuantizedModel) -> Iterator[Unsupported]:
    for key, tensor in _linear_weights(model).items():
        if tensor.qparams.axis is not None:
            yield Unsupported(
                key,
                "weight_granularity_linear='per_tensor' needs one scale for the weight of a "
                f"Linear; it has {tensor.qparams.scale.numel()}",
                "Train with overrides={'type:Linear': {'weight': {'granularity': 'per_tensor'}}}, "
                "and without a batch norm right after the layer, whose folding gives every "
                "channel its own scale",
            )


def _linear_weights(model: QuantizedModel) -> dict[str, QuantizedTensor]:
    found = {}
    for node in model.program.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            weight = as_dequantize(node.args[1])
            if weight is not None:
                found[weight.key] = model.tensors[weight.key]
    return found


def _dynamic_shapes(model: QuantizedModel) -> Iterator[Unsupported]:
    """Dynamic sizes that are not the batch: the first of every input, one size in the example.

    torch.export has several names for it where a model does not need its inputs to agree, as with
    a mask that is read by indices.
    """
    args, kwargs = model.example_inputs
    given = model.flat_inputs(args, kwargs)
    batch = None
    for node in model.program.graph.nodes:
        if node.op != "placeholder" or node.name not in model.input_names:
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt):
                continue
            count = given[node.name].shape[axis]
            if axis == 0 and batch is None:
                batch = count
            if axis or count != batch:
                yield Unsupported(
                    node.name,
                    f"only the batch may be dynamic; axis {axis} of this input is too",
                    "Fix all sizes, with example inputs of those that the device gets: "
                    "QATCallback(dynamic_shapes={}), or convert(..., dynamic_batch=False)",
                )


def _single_numbers(model: QuantizedModel) -> Iterator[Unsupported]:
    if not any("batch" in shape for shape in model.input_shapes.values()):
        return
    outputs: Any = model.program.graph.output_node().args[0]
    values = [node.meta["val"] for node in outputs if isinstance(node, torch.fx.Node)]
    for name, value in zip(model.output_names, values, strict=True):
        if not value.dim():
            kept = [other for other in model.output_names if other != name]
            yield Unsupported(
                name,
                "this output is one number for a whole batch, such as a loss, and the file takes "
                "one sample at a time",
                f"Leave it out: export_outputs={kept}" if kept else "Return one value per sample",
            )


def _size(model: QuantizedModel, largest: int) -> Iterator[Unsupported]:
    total = sum(
        tensor.integers.numel() for tensor in model.tensors.values() if tensor.integers is not None
    )
    # Quantized weights stand in the state as integers too, so only what is float is added.
    values = {**model.program.state_dict, **model.program.constants}.values()
    total += sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.is_floating_point())
    if total > largest:
        yield Unsupported(
            "the model",
            f"a file holds at most {largest:,} bytes; the constants are {total:,}",
            "Split the model, or use the targets 'fake_quant_onnx' or 'cann'",
        )
