"""Read the arguments of an ATen operator in a graph."""

from __future__ import annotations

from typing import Any

from torch import fx


def arguments_of(node: fx.Node) -> list[Any]:
    """The positional arguments of an operator, with the schema's defaults where none is given.

    A function without a schema, such as ``operator.getitem``, has the arguments that are given.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(node.args)
    positional = [argument for argument in schema.arguments if not argument.kwarg_only]
    missing = positional[len(node.args) :]
    return [*node.args, *(node.kwargs.get(a.name, a.default_value) for a in missing)]


def per_axis(value: Any, axes: int) -> list[int]:
    """An option such as a stride as one number per axis; torch also takes one number for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values
