"""Constants of a graph, as initializers, Constant nodes, or behind a Transpose or Cast."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array, CannotExpress

FOLLOWED = ("Transpose", "Identity", "Cast")
"""Operators through which a constant is read. Not all that preserve values: these are the ones
that tools write between a weight and its layer, and each is computed below."""
MOST_FOLLOWED = 64
"""So many of them at most: a walk for each of the readers of a long chain would not end."""


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``constant`` has an array for ``value``; computes none."""
    for node in followed(value):
        value = node.inputs[0]
    return value is not None and ir.convenience.get_const_tensor(value) is not None


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node, also cast and transposed; else None."""
    moves = list(followed(value))
    value = moves[-1].inputs[0] if moves else value
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is None:
        return None
    array = np.asarray(tensor.numpy())
    for node in reversed(moves):
        if node.op_type == "Cast":
            array = array.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())
        elif node.op_type == "Transpose":
            array = array.transpose(node.attributes.get_ints("perm", range(array.ndim)[::-1]))
    return array


def required_constant(value: ir.Value | None, what: str) -> Array:
    """The array of a constant.

    Raises:
        CannotExpress: ``value`` is computed from an input; the message names ``what``.
    """
    array = constant(value)
    if array is None:
        raise CannotExpress(f"the {what} must be a constant")
    return array


def followed(value: ir.Value | None) -> Iterator[ir.Node]:
    """The Transpose, Identity and Cast nodes that make ``value``, the last one first."""
    for _ in range(MOST_FOLLOWED):
        node = value.producer() if value is not None else None
        if node is None or node.op_type not in FOLLOWED:
            return
        yield node
        value = node.inputs[0]
