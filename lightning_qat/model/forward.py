"""Whether a module's own forward is running."""

from __future__ import annotations

from torch import nn
from torch.compiler import is_dynamo_compiling

_COMPILED = "_torchdynamo_orig_callable"
"""Where torch keeps the function that a compiled one was made of."""


def is_real_forward(module: nn.Module) -> bool:
    """Whether a call of the module runs its own forward.

    Under DDP Lightning sends training_step through the module's ``__call__`` with forward replaced
    for the moment; losses must not be quantized.
    """
    if is_dynamo_compiling():
        # training_step takes the place of forward outside of what is traced.
        return True
    own = module.__dict__.get("forward")
    # Lightning keeps the compiled forward of a module given to torch.compile on the module itself.
    real = own is None or getattr(own, "__func__", own) is type(module).forward
    return real or is_compiled_forward(own)


def is_compiled_forward(forward: object) -> bool:
    """Whether a function is what ``torch.compile`` made of another."""
    return hasattr(forward, _COMPILED)
