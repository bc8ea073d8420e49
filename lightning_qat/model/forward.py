"""Whether a module's own forward is running."""

from __future__ import annotations

from torch import nn


def is_real_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its own forward.

    Under DDP Lightning sends training_step through the module's ``__call__`` with forward replaced
    for the moment; losses must not be quantized.
    """
    forward = module.forward
    return getattr(forward, "__func__", forward) is type(module).forward or (
        "forward" not in module.__dict__
    )
