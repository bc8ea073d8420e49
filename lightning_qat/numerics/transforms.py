"""What torch.func and forward-mode differentiation see of a quantizer: operations of torch alone.

``torch.autograd.Function``, memory addresses and numbers read from tensors are nothing that
``vmap``, ``grad``, ``jvp`` and their relatives can transform. While one of them runs, quantizers
take the formulas of this file, whose values are the same to the bit and whose first derivatives are
the straight-through ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lightning_qat.numerics.qparams import IntegerGrid

_functorch: Any = getattr(torch._C, "_functorch", None)
_TRANSFORM: Any = getattr(_functorch, "CInterpreter", ())
_innermost: Callable[[], Any] = getattr(_functorch, "peek_interpreter_stack", lambda: None)


def is_transforming() -> bool:
    """Whether a transform of torch.func runs, or a level of forward-mode differentiation is open.

    Also while ``torch.compile`` traces one. Uses ``torch._C._functorch.peek_interpreter_stack``,
    ``CInterpreter`` beside it, and ``forward_ad._current_level``. Without them the answer is always
    False, and transforms fail with an error of torch about data pointers.
    """
    # torch.compile knows the type of what it finds there, and not whether that is None.
    return isinstance(_innermost(), _TRANSFORM) or getattr(forward_ad, "_current_level", -1) >= 0


def transformed_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Any, grid: IntegerGrid, gradient_everywhere: bool = False
) -> Tensor:
    """``fake_quantize`` for a transform; arguments as there."""
    step_min, step_max = grid.qmin - zero_point, grid.qmax - zero_point
    with torch.no_grad():
        steps = torch.round(x.to(torch.float32) / scale)
        reached = steps.clamp(step_min, step_max)
        values, inside = (reached * scale).to(x.dtype), steps == reached
    return _with_derivatives_of(values, x if gradient_everywhere else _where(inside, x))


def transformed_learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Tensor | None,
    grid: IntegerGrid,
    zero_point: Any,
    factor: float,
) -> Tensor:
    """``learned_fake_quantize`` for a transform; see there for the gradients.

    Args:
        x: Real values.
        scale: float32, positive; broadcasts against them.
        low: Lower end of the range, or ``None``.
        grid: The integers in use.
        zero_point: The integer that ``low`` gives.
        factor: The derivatives by ``scale`` and ``low`` are multiplied by it.
    """
    wide = x.to(torch.float32)
    step_min, step_max = grid.qmin - zero_point, grid.qmax - zero_point
    with torch.no_grad():
        fixed = scale.detach()
        steps = torch.round(wide / fixed)
        reached = steps.clamp(step_min, step_max)
        values = (reached * fixed).to(x.dtype)
        inside, moved = steps == reached, reached - wide / fixed
        outside = 1.0 - inside.to(torch.float32)
    # Of a clipped value: the end of the grid, which moves with the scale, and with the lower end.
    at_end = reached if low is None else (reached - step_min) * outside
    slope = torch.where(inside, moved, at_end)
    carried = _where(inside, wide) + factor * slope.detach() * scale
    if low is not None:
        carried = carried + factor * outside * low
    return _with_derivatives_of(values, carried.to(x.dtype))


def _where(inside: Tensor, x: Tensor) -> Tensor:
    """The values inside, zero elsewhere: what is infinite has no difference to itself."""
    return torch.where(inside, x, torch.zeros_like(x))


def _with_derivatives_of(values: Tensor, carrier: Tensor) -> Tensor:
    """The values of one tensor with the derivatives of another."""
    return values.detach() + (carrier - carrier.detach())
