"""The QAT class of a layer whose class is the user's: a subclass of torch's, or a parametrized one.

The user's class stays in front, so its ``forward`` runs as ever; ``super().forward`` of it is the
QAT layer's, which quantizes. A class that only adds a constructor or attributes inherits that
``forward`` outright. What its own ``forward`` multiplies with the weight is found by the plan.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

Kind = Any
"""The class of a layer, a ``type``; that of a QAT layer names its ``float_class``."""

_OWN = "_qat_own_class"
"""On a class made here: the user's class."""


def quantized_class(module: nn.Module, layer: Kind) -> Kind:
    """The class that a float layer gets.

    Args:
        module: The float layer.
        layer: The QAT layer of its float class.
    """
    kind: Kind = type(module)
    if parametrize.is_parametrized(module):
        # torch has put a class of the module's own in front; its only base is the layer's class.
        return _with_base(kind, _quantized(kind.__bases__[0], layer))
    return _quantized(kind, layer)


def unquantized_class(module: nn.Module) -> Kind:
    """The class that a layer had before."""
    kind: Kind = type(module)
    if parametrize.is_parametrized(module):
        return _with_base(kind, _unquantized(kind.__bases__[0]))
    return _unquantized(kind)


def own_class(kind: Kind) -> Kind:
    """The float class of a layer's class, without what torch's parametrize puts in front of it."""
    return kind.__bases__[0] if is_parametrized_class(kind) else kind


def has_own_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` of a user's class stands in front of the QAT layer's.

    What it multiplies may pass the layer's quantizers or not.
    """
    kind = own_class(type(module))
    layer = next(base for base in kind.__mro__ if "float_class" in vars(base))
    return runs_own_forward(kind, layer)


def has_own_products(module: nn.Module) -> bool:
    """Whether a user's class stands between a convolution's ``forward`` and torch's function."""
    kind: Kind = type(module)
    base = getattr(kind, "float_class", None)
    own = getattr(kind, "_conv_forward", None)
    return own is not None and base is not None and own is not base._conv_forward


def runs_own_forward(kind: Kind, layer: Kind) -> bool:
    """Whether a class computes otherwise than the float class of a QAT layer.

    Args:
        kind: The class, float or quantized.
        layer: The QAT layer.
    """
    base = layer.float_class
    names = [name for name in ("forward", "_conv_forward") if hasattr(base, name)]
    own = {name: getattr(kind, name) for name in names}
    return any(
        own[name] is not getattr(base, name) and own[name] is not getattr(layer, name)
        for name in names
    )


def is_parametrized_class(kind: Kind) -> bool:
    """Whether ``torch.nn.utils.parametrize`` has made a class, for one module."""
    name: str = kind.__name__
    return kind.__module__ == parametrize.__name__ and name.startswith("Parametrized")


@cache
def _quantized(kind: Kind, layer: Kind) -> Kind:
    if kind is layer.float_class:
        return layer
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, _OWN: kind}
    return type(f"{kind.__name__}QAT", (kind, layer), names)


def _unquantized(kind: Kind) -> Kind:
    own: Kind = kind.__dict__.get(_OWN, kind.float_class)
    return own


def _with_base(kind: Kind, base: Kind) -> Kind:
    """A class for one module as ``torch.nn.utils.parametrize`` made it, of another base."""
    names = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{base.__name__}", (base,), names)


def rebuild(own: Kind, layer: Kind) -> Any:
    """An empty module of the class of a user's layer, for pickle."""
    kind = _quantized(own, layer)
    return kind.__new__(kind)


def pickled(module: Any) -> Any:
    """How pickle and copy are to rebuild a module whose class was made here."""
    own, layer = type(module).__bases__
    return rebuild, (own, layer), module.__getstate__()


def is_made_here(kind: Kind) -> bool:
    """Whether a class stands for a user's class."""
    return _OWN in vars(kind)
