"""Weights that are views of a parameter, as a quantizer may be called with them."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.model.torch_private import all_modules_are_hooked


def as_module_input(weight: Tensor) -> Tensor:
    """The same weight, detached where a hook on all modules would fail on it.

    Without a gradient torch gives a view of a parameter ``requires_grad`` and no place in a graph.
    The FLOP counter, which Lightning's model summary runs, raises on such an input of a module.
    Without such hooks a view stays what it is: known as a part of its parameter, so that it is
    quantized once per evaluation.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or weight._base is None:
        return weight
    return weight.detach() if all_modules_are_hooked() else weight
