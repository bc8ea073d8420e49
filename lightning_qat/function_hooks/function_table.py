"""The functions whose inputs an integer target wants quantized, and those that keep values.

A *join* computes with real values: an integer target needs its inputs on a grid. A *passing*
function hands on values it was given (or zero), so that what comes out lies on the grid of what
went in. Everything else is float to both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["join", "tie", "pass"]


class FunctionTraits(NamedTuple):
    """How one function is treated.

    Args:
        name: One name for all spellings: ``add`` for ``+``, ``+=``, ``torch.add``, ``Tensor.add_``.
        kind: ``tie`` is a join whose inputs share one grid, which its output keeps (``cat``).
        operands: How many leading arguments are quantized.
        in_place: It changes its first argument.
    """

    name: str
    kind: Kind
    operands: int
    in_place: bool


# Name to kind, operands, further spellings. In-place spellings (with a trailing underscore) and
# Python operators are found by name.
_TABLE: tuple[tuple[str, Kind, int, tuple[str, ...]], ...] = (
    ("add", "join", 2, ("__add__", "__radd__", "__iadd__", "add_")),
    ("sub", "join", 2, ("__sub__", "__rsub__", "__isub__", "sub_", "subtract", "rsub")),
    ("mul", "join", 2, ("__mul__", "__rmul__", "__imul__", "mul_", "multiply")),
    ("matmul", "join", 2, ("__matmul__", "__rmatmul__", "bmm", "mm")),
    ("scaled_dot_product_attention", "join", 3, ()),
    ("cat", "tie", 1, ("concat", "concatenate")),
    ("stack", "tie", 1, ()),
    ("avg_pool", "join", 1, ("avg_pool1d", "avg_pool2d", "avg_pool3d")),
    (
        "adaptive_avg_pool",
        "join",
        1,
        ("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    ),
    ("mean", "join", 1, ()),
    ("softmax", "join", 1, ()),
    ("sigmoid", "join", 1, ("sigmoid_",)),
    ("tanh", "join", 1, ("tanh_",)),
    ("hardswish", "join", 1, ()),
    ("hardsigmoid", "join", 1, ()),
    # Computed in float everywhere, but what is added up before it need not be.
    ("layer_norm", "join", 1, ()),
    ("rms_norm", "join", 1, ()),
    ("group_norm", "join", 1, ()),
    ("instance_norm", "join", 1, ()),
    ("gelu", "join", 1, ()),
    ("silu", "join", 1, ()),
    ("mish", "join", 1, ()),
    ("elu", "join", 1, ()),
    ("leaky_relu", "join", 1, ()),
    ("interpolate", "join", 1, ("upsample",)),
    ("relu", "pass", 1, ("relu_",)),
    ("max_pool", "pass", 1, ("max_pool1d", "max_pool2d", "max_pool3d")),
    (
        "adaptive_max_pool",
        "pass",
        1,
        ("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    ),
    ("pad", "pass", 1, ()),
    ("dropout", "pass", 1, ("dropout1d", "dropout2d", "dropout3d", "feature_dropout")),
    ("reshape", "pass", 1, ("view", "flatten", "unflatten", "squeeze", "unsqueeze")),
    ("permute", "pass", 1, ("transpose", "movedim", "swapaxes", "t", "swapdims", "moveaxis")),
    ("expand", "pass", 1, ("repeat", "tile", "broadcast_to", "expand_as")),
    ("contiguous", "pass", 1, ("clone", "detach")),
    ("getitem", "pass", 1, ("__getitem__", "narrow", "select", "index_select", "flip", "roll")),
    ("chunk", "pass", 1, ("split", "unbind", "tensor_split", "split_with_sizes")),
    ("pixel_shuffle", "pass", 1, ("pixel_unshuffle", "channel_shuffle")),
)


def _functions() -> Mapping[Callable[..., Any], FunctionTraits]:
    found: dict[Callable[..., Any], FunctionTraits] = {}
    for name, kind, operands, spellings in _TABLE:
        for spelling in (name, *spellings):
            in_place = spelling.startswith("__i") or (
                spelling.endswith("_") and not spelling.startswith("__")
            )
            for namespace in (torch, Tensor, F, torch._C._nn):  # pyright: ignore
                function = getattr(namespace, spelling, None)
                if callable(function):
                    found[function] = FunctionTraits(name, kind, operands, in_place)
    for name in ("T", "mT", "H", "mH"):
        found[getattr(Tensor, name).__get__] = FunctionTraits("permute", "pass", 1, False)
    return found


FUNCTION_TABLE = _functions()
"""Every spelling that ``torch`` hands to a function mode, and how it is treated."""


def operands_of(
    function: FunctionTraits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """The tensors of a call that could be quantized; empty for a call that is not counted.

    Counted are calls with as many float tensors as the function takes: not ``x + 1``, not index
    arithmetic, and not the batches that a batch norm counts in training only.
    """
    values = [*args, *kwargs.values()][: function.operands]
    if function.kind == "tie":
        values = list(values[0]) if values and isinstance(values[0], list | tuple) else []
    tensors = tuple(v for v in values if isinstance(v, Tensor) and v.is_floating_point())
    if not tensors or len(tensors) != len(values):
        return ()
    if function.kind != "tie" and len(tensors) < function.operands:
        return ()
    return tensors if all(t.dim() for t in tensors) else ()


def leads_with_real(args: tuple[Any, ...]) -> bool:
    """Whether a call's first argument is a float tensor.

    Such calls are counted although none of their operands is quantized: one with a number may
    stand on the line of one with tensors.
    """
    return bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()


def preserves_values(
    function: FunctionTraits, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether this call of a passing function, or of ``interpolate``, hands values on unchanged."""
    if function.name == "interpolate":
        mode = kwargs.get("mode", args[3] if len(args) > 3 else "nearest")
        return str(mode).startswith("nearest")
    if function.name == "pad":
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        return mode != "constant" or value in (None, 0, 0.0)
    return function.kind == "pass"


def fixed_output_range(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, float] | None:
    """The range that a function's output has by its definition, in 8 bits; ``None``: none.

    Sigmoid and softmax get ``(0, 255/256)`` and tanh ``(-1, 127/128)``, so that their scales are
    1/256 and 1/128 with zero points -128 and 0: what TFLite's specification demands of them.
    """
    name = getattr(function, "__name__", "").strip("_")
    if name in ("sigmoid", "softmax", "hardsigmoid"):
        return 0.0, 255.0 / 256.0
    if name == "tanh":
        return -1.0, 127.0 / 128.0
    if name == "relu6":
        return 0.0, 6.0
    if name in ("hardtanh", "clamp", "clip"):
        # hardtanh(input, min_val=-1, max_val=1); clamp(input, min, max)
        keys = ("min_val", "max_val") if name == "hardtanh" else ("min", "max")
        low, high = (
            kwargs.get(key, args[i + 1] if len(args) > i + 1 else default)
            for i, (key, default) in enumerate(zip(keys, (-1.0, 1.0), strict=True))
        )
        if name != "hardtanh" and (len(args) < 3 and not {"min", "max"} <= set(kwargs)):
            return None
        if isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 < high:
            return float(low), float(high)
    return None
