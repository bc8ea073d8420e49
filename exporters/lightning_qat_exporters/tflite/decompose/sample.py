"""The one sample that a file is made for where the batch is dynamic, and where outputs have it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_qat.ir.quantized_model import QuantizedModel


def sample_of(model: QuantizedModel) -> dict[str, Tensor]:
    """The example inputs by name; the first sample of each whose first dimension is dynamic."""
    args, kwargs = model.example_inputs
    values = model.flat_inputs(args, kwargs)
    shapes = {
        node.name: node.meta["val"].shape
        for node in model.program.graph.nodes
        if node.name in values
    }
    return {
        name: x[:1] if x.dim() and isinstance(shapes[name][0], torch.SymInt) else x
        for name, x in values.items()
    }


def later_batch_axes(model: QuantizedModel) -> dict[str, int]:
    """The axis of the batch of every output that has it elsewhere than first, by name.

    Example: ``{"log_probs": 1}`` for (time, batch, classes), as a loss of CTC takes it.
    """
    outputs: Any = model.program.graph.output_node().args[0]
    found = {}
    for name, node in zip(model.output_names, outputs, strict=True):
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        sizes = value.shape if isinstance(value, Tensor) else ()
        axis = next((i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)), 0)
        if axis:
            found[name] = axis
    return found
