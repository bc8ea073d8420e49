"""Calls that save compressed activations for backward: one bit per element, or integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_qat.function_hooks.relu_fusion import CLAMP_CALLS
from lightning_qat.numerics.bitmask import masked, pack_between
from lightning_qat.numerics.int_repr import saving_int_repr
from lightning_qat.numerics.transforms import is_transforming


def compactly(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function so that backward keeps little, with the values and gradients it has anyway.

    Relu, relu6 and hardtanh keep one bit per element instead of a float tensor. Of every other
    function's operands those that carry integers are kept as these.
    """
    relu = CLAMP_CALLS.get(function)
    if relu is not None:
        return _clamp(*relu(*args, **kwargs))
    first = args[0] if args else None
    operands = (*first, *args[1:]) if isinstance(first, list | tuple) else args
    with saving_int_repr(*operands, *kwargs.values()):
        return function(*args, **kwargs)


def _clamp(x: Tensor, low: float, high: float, in_place: bool) -> Tensor:
    if is_transforming() or not (x.requires_grad and torch.is_grad_enabled()):
        return x.clamp_(low, high) if in_place else x.clamp(low, high)
    result: Tensor = _Clamp.apply(x, low, high, in_place)  # type: ignore[no-untyped-call]
    return result


class _Clamp(torch.autograd.Function):
    """The gradient passes strictly between the ends, as torch has it for relu and hardtanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
        result = x.clamp_(low, high) if in_place else x.clamp(low, high)
        ctx.save_for_backward(pack_between(result, low, high))
        ctx.layout = result.shape, result.stride()
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return masked(grads[0], *ctx.saved_tensors, *ctx.layout), None, None, None
