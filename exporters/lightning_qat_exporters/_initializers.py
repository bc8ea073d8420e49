"""Constants of an ONNX graph by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir


def initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """The initializer of that name, made from ``array`` when the graph has none yet."""
    if name in graph.initializers:
        return graph.initializers[name]
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
