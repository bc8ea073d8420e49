"""The planned operands of one call, quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_qat.function_hooks.function_table import FunctionTraits
from lightning_qat.function_hooks.quantizer_protocol import InputQuantizer
from lightning_qat.model.module_input import as_module_input

_KEYWORDS = (
    ("mat1", "batch1", "input", "self", "query", "tensors"),
    ("batch2", "other", "mat2", "key", "weight"),
    ("value",),
)


class AnotherPath(Exception):
    """A call does not have the tensors that the plan knows."""


def quantize_operands(
    known: FunctionTraits,
    operands: Mapping[int, InputQuantizer],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with its planned operands quantized.

    Operands beyond those of the call are inside the function; see ``attention.py``.
    """
    new_args, new_kwargs = list(args), dict(kwargs)
    for index, quantizer in operands.items():
        if index >= known.operands:
            continue
        holder: Any = new_args
        slot: Any = known.first + index
        if slot >= len(new_args):
            holder = new_kwargs
            slot = next((name for name in _KEYWORDS[index] if name in kwargs), None)
        value = holder[slot] if slot is not None else None
        if known.trait == "concat" and isinstance(value, list | tuple):
            holder[slot] = quantizer.quantize_tied([_float_tensor(item) for item in value])
        else:
            holder[slot] = quantizer(as_module_input(_float_tensor(value)))
    return tuple(new_args), new_kwargs


def _float_tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"a {value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise AnotherPath(f"expected a float tensor, got {kind}")
    return value
