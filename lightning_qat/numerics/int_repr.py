"""Tensors on a grid as their integers, which take less memory until backward.

A tensor on a grid *is* its integers times a scale, so a convolution need not keep a float copy of
its input: backward gets the very same numbers back.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.compiler import is_dynamo_compiling

from lightning_qat.numerics.gpu import activations as gpu
from lightning_qat.numerics.kernels import loops as kernels


class IntRepr:
    """A tensor on a grid as its integers.

    Args:
        integers: Of any type.
        scale: Broadcasts against them.
        zero_point: Likewise, or a number.
    """

    __slots__ = ("integers", "scale", "zero_point")

    def __init__(self, integers: Tensor, scale: Tensor, zero_point: Tensor | float) -> None:
        self.integers, self.scale, self.zero_point = integers, scale, zero_point

    def restore(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The real values, ``(integer - zero_point) * scale`` in float32, rounded to a dtype."""
        known = gpu.restore(self.integers, self.scale, self.zero_point, dtype)
        if known is not None:
            return known
        if isinstance(self.zero_point, float):
            restored = kernels.restore(self.integers, self.scale, self.zero_point)
            if restored is not None:
                return restored.to(dtype)
        values = self.integers.to(torch.float32)
        if not (isinstance(self.zero_point, float) and self.zero_point == 0):
            values.sub_(self.zero_point)
        return values.mul_(self.scale).to(dtype)


def attach_int_repr(x: Tensor, int_repr: IntRepr) -> None:
    """Attach the integers of a tensor on a grid to the tensor."""
    x._qat_int_repr = int_repr  # type: ignore[attr-defined]


def int_repr_of(x: object) -> IntRepr | None:
    """The integers attached to a tensor, or ``None``."""
    int_repr: IntRepr | None = getattr(x, "_qat_int_repr", None)
    return int_repr


def saving_int_repr(*operands: object) -> AbstractContextManager[object]:
    """Let the operations inside keep integers instead of real operands for backward.

    Args:
        operands: Tensors; those that carry integers, and views of their memory, are kept so.
    """
    if is_dynamo_compiling():
        return nullcontext()
    known = {}
    for operand in operands:
        int_repr = int_repr_of(operand)
        if int_repr is not None and isinstance(operand, Tensor):
            known[_memory(operand)] = int_repr, operand.storage_offset()
    if not known:
        return nullcontext()

    def pack(x: Tensor) -> object:
        found = known.get(_memory(x))
        if found is None or not x.is_floating_point():
            return x
        # Weights that were quantized together share a storage.
        int_repr, offset = found
        return int_repr, x.dtype, x.shape, x.stride(), x.storage_offset() - offset

    return saved_tensors_hooks(pack, _unpacked)


def _memory(x: Tensor) -> int:
    """The identity of the memory that a tensor lies in, on every device."""
    return int(x.untyped_storage()._cdata)


def _unpacked(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    int_repr, dtype, *layout = kept
    restored: Tensor = int_repr.restore(dtype)
    return restored.as_strided(*layout)
