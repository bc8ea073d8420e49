"""Write nodes into a graph that is being rewritten."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat_exporters.cann.qdq_graph.names import unique
from lightning_qat_exporters.cann.qdq_graph.types import Array

_DTYPES = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 1}


def typed(attributes: dict[str, Any]) -> list[ir.Attr]:
    """Attributes of the four types that are written here.

    ``ir.node`` infers types by protocols, which took a fifth of a conversion.
    """
    make: dict[type, Callable[[str, Any], ir.Attr]] = {
        int: ir.AttrInt64,
        float: ir.AttrFloat32,
        str: ir.AttrString,
        list: ir.AttrInt64s,
    }
    return [make[type(value)](name, value) for name, value in attributes.items()]


class GraphWriter:
    """Inserts named nodes into a graph, and constants once the names they take are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: list[ir.Value] = []

    def constant(self, name: str, values: Array | np.generic | ir.LazyTensor) -> ir.Value:
        tensor = values if isinstance(values, ir.LazyTensor) else ir.Tensor(np.asarray(values))
        shape = ir.Shape(tensor.shape.numpy())
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor
        )
        self._constants.append(value)
        return value

    def insert(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value],
        attributes: dict[str, Any],
        name: str,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        after: bool = False,
    ) -> ir.Value:
        """Insert a node whose output has its first input's shape and is ``<name>.output0``."""
        output = ir.Value(name=f"{name}.output0", type=ir.TensorType(dtype), shape=inputs[0].shape)
        node = ir.Node("", op_type, inputs, typed(attributes), outputs=[output], name=name)
        (self.graph.insert_after if after else self.graph.insert_before)(anchor, node)
        return output

    def cast(
        self,
        anchor: ir.Node,
        value: ir.Value,
        to: ir.DataType,
        name: str,
        *,
        after: bool = False,
    ) -> ir.Value:
        """Insert a Cast."""
        return self.insert(anchor, "Cast", [value], {"to": int(to)}, name, dtype=to, after=after)

    def take_over(
        self,
        old: ir.Value,
        new: ir.Value,
        anchor: ir.Node,
        uses: Sequence[tuple[ir.Node, int]] | None = None,
    ) -> None:
        """Let ``new`` replace ``old`` in its uses and as a graph output, which keeps its name.

        Without ``uses`` they are all but that of the producer of ``new``.
        """
        if old.is_graph_output() and (new.is_graph_output() or new.producer() is None):
            new = self.insert(anchor, "Identity", [new], {}, f"{new.name}.copy", dtype=_type(new))
        if old.is_graph_output():
            new.name, old.name = old.name, None
        for user, index in old.uses() if uses is None else uses:
            if user is not new.producer():
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new

    def register_constants(self) -> None:
        taken = {v.name for v in (*self.graph.inputs, *self.graph.initializers.values()) if v.name}
        taken |= {v.name for node in self.graph for v in node.outputs if v.name}
        for value in self._constants:
            if value.uses():
                assert value.name is not None
                value.name = unique(value.name, taken)
                self.graph.register_initializer(value)


def _type(value: ir.Value) -> ir.DataType:
    return value.dtype or ir.DataType.FLOAT
