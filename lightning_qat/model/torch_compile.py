"""Modules that ``torch.compile`` has wrapped, by the names that their author gave them."""

from __future__ import annotations

from typing import Any

from torch import nn

_WRAPPED = "_orig_mod"


def plain_path(path: str) -> str:
    """A dotted path without the names that ``torch.compile`` puts into it.

    Example:
        >>> plain_path("net._orig_mod.conv")
        'net.conv'
    """
    return ".".join(name for name in path.split(".") if name != _WRAPPED)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    while (inner := module._modules.get(_WRAPPED)) is not None:
        module = inner
    return module


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of a model was given to ``torch.compile``."""
    return any(
        _WRAPPED in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    )


def trace_hooks(model: nn.Module) -> None:
    """Have the hooks of compiled modules become part of their graphs.

    By default those of the very module that was wrapped run outside.
    """
    wrappers: list[Any] = [module for module in model.modules() if _WRAPPED in module._modules]
    if wrappers:
        import torch._dynamo

        with torch._dynamo.config.patch(wrap_top_frame=True):
            for wrapper in wrappers:
                wrapper._initialize()
