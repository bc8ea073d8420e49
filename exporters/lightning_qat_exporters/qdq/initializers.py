"""Constants of an ONNX graph by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """An initializer with the values of ``array``, of that name or ``name_1`` and so on.

    One of that name that holds the same values is used again.
    """
    wanted, count = name, 0
    while name in graph.initializers:
        stored = array_of(graph.initializers[name])
        if stored is not None and stored.dtype == array.dtype and np.array_equal(stored, array):
            return graph.initializers[name]
        count += 1
        name = f"{wanted}_{count}"
    tensor = ir.tensor(np.array(array, order="C"), name=name)
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def array_of(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """The array of a constant; ``None`` when the value is computed at run time."""
    return None if value is None or value.const_value is None else value.const_value.numpy()
