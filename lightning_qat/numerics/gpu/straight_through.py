"""Fake quantization with a straight-through gradient on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_qat.numerics.gpu.activations import fake_quantize
from lightning_qat.numerics.gpu.device_grid import DeviceGrid
from lightning_qat.numerics.int_repr import IntRepr, attach_int_repr
from lightning_qat.numerics.kernels.loops import ALL
from lightning_qat.numerics.min_max import Observe
from lightning_qat.numerics.rounding import StraightThrough


def quantize_on_device(
    x: Tensor,
    grid: DeviceGrid,
    *,
    clamp: tuple[float, float] = ALL,
    gradient_everywhere: bool = False,
    carries_int_repr: bool = False,
    observe: Observe | None = None,
) -> Tensor:
    """``fake_quantize``, or ``clamp_and_quantize``, of a tensor that the kernels take.

    Args:
        x: Real values.
        grid: The grid, and where its numbers are.
        clamp: Clamp to these ends first.
        gradient_everywhere: See ``fake_quantize``; with several rows it must be set.
        carries_int_repr: See ``fake_quantize``.
        observe: Is called with the range.
    """
    found = fake_quantize(
        x.detach(),
        grid,
        clamp=clamp,
        keeps_bits=x.requires_grad and torch.is_grad_enabled() and not gradient_everywhere,
        keeps_codes=carries_int_repr,
        observes=observe is not None and x.numel() > 0,
    )
    if observe is not None and found.range is not None:
        observe(found.range)
    result: Tensor = StraightThrough.apply(x, lambda: (found.values, found.bits))  # type: ignore[no-untyped-call]
    if found.codes is not None:
        attach_int_repr(result, int_repr_of_codes(found.codes, found.numbers, x.dim()))
    return result


def int_repr_of_codes(codes: Tensor, numbers: Tensor | None, dims: int) -> IntRepr:
    """The integers of a kernel with their scales; ``numbers`` as in ``Quantized``."""
    assert numbers is not None
    shape = [-1] + [1] * (dims - 1) if numbers.shape[1] > 1 else []
    scale, zero_point = (number.reshape(shape) for number in numbers.unbind())
    return IntRepr(codes, scale, zero_point)
