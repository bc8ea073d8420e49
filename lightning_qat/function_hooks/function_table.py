"""Look-ups by torch function: how quantization treats a call, from the table of operators.

Everything here is about the functions that ``torch`` hands to a ``TorchFunctionMode`` and about
their arguments. The knowledge about operators is in ``ir/operators.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from lightning_qat.ir.operators import (
    CLAMPS,
    FIXED_OUTPUT_RANGES,
    LAYER_FUNCTIONS,
    OPERATORS,
    PRODUCTS,
    Clamp,
    Trait,
)
from lightning_qat.model.torch_private import function_namespaces
from lightning_qat.numerics.einsum import is_product


class FunctionTraits(NamedTuple):
    """How one function is treated.

    Args:
        name: One name for all spellings: ``add`` for ``+``, ``+=``, ``torch.add``, ``Tensor.add_``.
        trait: See ``lightning_qat.ir.operators``.
        operands: How many arguments are quantized.
        in_place: It changes its first argument.
        first: Position of the first argument that is quantized.
    """

    name: str
    trait: Trait
    operands: int
    in_place: bool
    first: int = 0

    @property
    def of_layers(self) -> bool:
        """Whether layers call it, with operands that they have quantized themselves."""
        return self.name in LAYER_FUNCTIONS

    @property
    def is_product(self) -> bool:
        """Whether it multiplies two tensors and adds up."""
        return self.name in PRODUCTS


def torch_functions(name: str) -> Iterator[Callable[..., Any]]:
    """Every torch function of a name, as a function mode receives it."""
    for namespace in function_namespaces():
        function = getattr(namespace, name, None)
        if callable(function):
            yield function
        elif function is not None:
            # An attribute such as ``x.T``.
            yield function.__get__


def _functions() -> Mapping[Callable[..., Any], FunctionTraits]:
    found: dict[Callable[..., Any], FunctionTraits] = {}
    for operator in OPERATORS:
        if operator.trait is None:
            continue
        for spelling in operator.torch:
            traits = FunctionTraits(
                *(operator.name, operator.trait, operator.operands),
                in_place=is_in_place(spelling),
                first=operator.first,
            )
            found |= dict.fromkeys(torch_functions(spelling), traits)
    return found


def is_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument."""
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


FUNCTION_TABLE = _functions()
"""Every function of the table that ``torch`` hands to a function mode, and how it is treated."""


def function_name(function: Callable[..., Any]) -> str:
    """The name of a function: that of its operator, whatever the spelling, or its own."""
    known = FUNCTION_TABLE.get(function)
    if known is not None:
        return known.name
    return str(getattr(function, "__name__", "function")).strip("_")


def reader_kind(function: str) -> Literal["join", "product", "output"]:
    """What a consumer is to a recipe, by the name of its operator.

    Example:
        >>> reader_kind("add"), reader_kind("matmul"), reader_kind("output")
        ('join', 'product', 'output')
    """
    if function == "output":
        return "output"
    multiplies = function in PRODUCTS or function == "scaled_dot_product_attention"
    return "product" if multiplies else "join"


def operands_of(
    function: FunctionTraits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """The tensors of a call that could be quantized; empty for a call that is not counted.

    Counted are calls with as many float tensors as the function takes: not ``x + 1``, not index
    arithmetic, not nested tensors, not powers below 1, and not the batches that a batch norm counts
    in training only.
    """
    given = [*args, *kwargs.values()]
    if not _has_trait(function, given):
        return ()
    values = given[function.first : function.first + function.operands]
    if function.trait == "concat":
        values = list(values[0]) if values and isinstance(values[0], list | tuple) else []
    tensors = tuple(v for v in values if _is_real(v))
    if not tensors or len(tensors) != len(values):
        return ()
    if function.trait != "concat" and len(tensors) < function.operands - function.first:
        return ()
    return tensors if all(t.dim() for t in tensors) else ()


def _has_trait(function: FunctionTraits, given: list[Any]) -> bool:
    """Whether a call with these arguments is one that the table means."""
    second = given[1] if len(given) > 1 else None
    if function.name == "pow":
        # Finite at 0.
        return len(given) < 2 or (isinstance(second, int | float) and second >= 1)
    if function.name == "max":
        return not isinstance(second, Tensor)
    if function.name == "masked_fill":
        return len(given) == 3 and isinstance(given[2], int | float) and given[2] == 0
    return function.name != "einsum" or is_product(given[0], tuple(given[1:]))


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not value.is_nested


def leads_with_real(args: tuple[Any, ...]) -> bool:
    """Whether a call's first argument is a float tensor.

    Such calls are counted although none of their operands is quantized: one with a number may
    stand on the line of one with tensors.
    """
    return bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()


def preserves_values(
    function: FunctionTraits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the output of this call has only values of its input, or zero.

    Such a call keeps the scale and zero point of its input.
    """
    if function.name == "interpolate":
        mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
        return str(mode).startswith("nearest")
    if function.name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or value in (None, 0, 0.0)
    return function.trait == "quantization_agnostic"


def fixed_output_range(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """The range that a function's output has by its definition, in 8 bits; ``None``: none.

    Of a clamp: its two ends, where both are numbers and real zero lies between them.
    """
    name = getattr(function, "__name__", "").strip("_")
    name = "clamp" if name == "clip" else name
    clamp = CLAMPS.get(name)
    if clamp is None:
        return FIXED_OUTPUT_RANGES.get(name)
    low, high = clamp_ends(clamp, args, kwargs)
    if isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 < high:
        return float(low), float(high)
    return None


def clamp_ends(clamp: Clamp, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The two ends in one call of an operator that clamps; ``None``: no such end."""
    if not clamp.arguments:
        return clamp.low, clamp.high
    low, high = (
        kwargs.get(key, args[i] if len(args) > i else default)
        for i, (key, default) in enumerate(zip(clamp.arguments, clamp[:2], strict=True), 1)
    )
    return low, high
