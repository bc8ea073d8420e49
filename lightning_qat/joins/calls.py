"""One call of a function that a forward makes, as it was seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.function_hooks.function_table import (
    FunctionTraits,
    fixed_output_range,
    preserves_values,
)
from lightning_qat.quantizers import names

INPUT = "input"


@dataclass(frozen=True)
class Operand:
    """A consumer of a tensor: an operand of a call, a layer's input, or an output of the model.

    Args:
        module: Dotted path of the module that makes the call.
        function: Operator name; ``input`` for a layer's input, ``output`` for an output.
        call: The n-th call of the function in the module; for names only.
        operand: Number of the operand.
        call_key: Tells calls apart: ``add@forward[+#0]:0``.
    """

    module: str
    function: str
    call: int = field(compare=False)
    operand: int
    call_key: str = ""

    def __str__(self) -> str:
        if self.function == INPUT:
            return self.module or "input"
        where = f"{self.module}.{self.function}" if self.module else self.function
        return f"{where}:{self.call}[{self.operand}]"

    @property
    def quantizer_path(self) -> str:
        """Dotted path of the quantizer that is named after this consumer."""
        if self.function == INPUT:
            return names.input_path(self.module)
        return names.join_path(self.module, self.function, self.call, self.operand)


CASTS = frozenset("to float half bfloat16 double type type_as".split())
"""Functions whose result is their tensor in another dtype, or the very same one."""


@dataclass(frozen=True)
class Call:
    """A call that has run.

    Args:
        module: Dotted path of the module that makes it.
        function: Operator name, or the function's own.
        number: The n-th call of the function in the module.
        key: Tells calls apart; see ``Operand``.
        known: Its row in the table, if it has one.
        func: The function.
        args: Its arguments by position.
        kwargs: Its arguments by keyword.
        tensors: The operands that could be quantized.
        keys: Their values, before the call.
        leaves: The tensors that it returned.
    """

    module: str
    function: str
    number: int
    key: str
    known: FunctionTraits | None
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    keys: tuple[Key, ...]
    leaves: Sequence[Tensor]

    def operand(self, number: int) -> Operand:
        """One of its operands."""
        return Operand(self.module, self.function, self.number, number, self.key)

    @property
    def made(self) -> str:
        """What makes its results: module path and function."""
        return f"{self.module}.{self.function}" if self.module else self.function

    @cached_property
    def outs(self) -> tuple[Key, ...]:
        """The float tensors that it returned."""
        return tuple(key_of(leaf) for leaf in self.leaves if leaf.is_floating_point())

    @property
    def keeps_values(self) -> bool:
        """Whether its results have values of its first operand, or zero."""
        known = self.known
        return (
            known is not None
            and bool(self.tensors)
            and preserves_values(known, self.args, self.kwargs)
        )

    @property
    def known_range(self) -> tuple[tuple[float, float] | None, bool]:
        """The range that its results have by definition, and whether they have no negatives."""
        fixed = fixed_output_range(self.func, self.args, self.kwargs)
        return fixed, self.function == "relu" or bool(fixed and fixed[0] >= 0)

    @property
    def cast_of(self) -> Key | None:
        """The float tensor that it gives another dtype and nothing more; ``None``: none."""
        cast = self.function in CASTS and bool(self.float_operands)
        return key_of(self.float_operands[0]) if cast else None

    @cached_property
    def float_operands(self) -> tuple[Tensor, ...]:
        """The float tensors among its arguments."""
        given = pytree.tree_leaves((self.args, self.kwargs))
        return tuple(x for x in given if isinstance(x, Tensor) and x.is_floating_point())


class Watch(TorchFunctionMode):
    """Hands every torch function to a watcher, which calls it.

    Args:
        watcher: Takes the function, its arguments by position and those by keyword.
    """

    def __init__(self, watcher: Callable[[Callable[..., Any], Any, dict[str, Any]], Any]) -> None:
        super().__init__()
        self._watcher = watcher

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self._watcher(func, args, kwargs or {})
