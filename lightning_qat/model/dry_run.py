"""Run a model once on example inputs; the model is the same afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.model.inputs import Inputs, as_call, device_of
from lightning_qat.model.torch_compile import without_compiling


def call_of(model: nn.Module, example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of ``forward``, on the model's device."""
    device = device_of(model)
    moved = pytree.tree_map_only(Tensor, lambda t: t.to(device), as_call(example_inputs))
    args, kwargs = moved
    return args, kwargs


@contextmanager
def unchanged_afterwards(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, random numbers of its own; afterwards everything is as before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def order_of_calls(
    model: nn.Module, layers: Collection[nn.Module], example_inputs: Inputs
) -> list[nn.Module]:
    """Return the layers that one forward calls, in the order of their first calls."""
    # Hooks on its layers also keep a transformer encoder from its fused kernel, which calls none.
    called: dict[nn.Module, None] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        called.setdefault(module)

    args, kwargs = call_of(model, example_inputs)
    handles = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        with unchanged_afterwards(model), without_compiling():
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(called)
