"""The inputs that a file is made for: one sample where the batch is dynamic."""

from __future__ import annotations

import torch
from torch import Tensor

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
