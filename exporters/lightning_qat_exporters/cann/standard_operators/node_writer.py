"""Write the standard operators that stand for one node of a deploy model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import Array
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter, typed


class NodeWriter:
    """Writes operators before a node, named after it.

    Args:
        graph: The graph that is rewritten.
        node: The node that they stand for.
        alarms: What is wrong where an added graph output is not 0, by the output's name; filled in.
    """

    def __init__(self, graph: GraphWriter, node: ir.Node, alarms: dict[str, str]) -> None:
        self._graph, self._node, self._alarms = graph, node, alarms
        self._written = 0
        self.label = node.name or node.outputs[0].name or node.op_type

    def __call__(
        self,
        op_type: str,
        *inputs: ir.Value | Array | np.generic | None,
        dtype: ir.DataType = ir.DataType.FLOAT,
        outputs: int = 1,
        **attributes: Any,
    ) -> ir.Value:
        """Write one operator; inputs that are arrays become constants.

        Returns:
            Its first output, of the type ``dtype`` as the others are.
        """
        self._written += 1
        name = f"{self.label}.{self._written}.{op_type}"
        values = [
            i if i is None or isinstance(i, ir.Value) else self._graph.constant(f"{name}.{n}", i)
            for n, i in enumerate(inputs)
        ]
        names = [name, *(f"{name}.{n}" for n in range(1, outputs))]
        made = [ir.Value(name=n, type=ir.TensorType(dtype)) for n in names]
        node = ir.Node("", op_type, values, typed(attributes), outputs=made, name=name)
        self._graph.graph.insert_before(self._node, node)
        return made[0]

    def cast(self, value: ir.Value | Array, to: ir.DataType) -> ir.Value:
        """Write a Cast."""
        return self("Cast", value, dtype=to, to=int(to))

    def replace(self, *values: ir.Value) -> None:
        """Let values stand for the node's outputs, and remove the node."""
        for old, new in zip(self._node.outputs, values, strict=True):
            self._graph.replace(old, new, self._node)
        self._graph.graph.remove(self._node, safe=True)

    def raise_where(self, wrong: ir.Value, text: str) -> None:
        """Add a graph output that is not 0 where any element of the bool ``wrong`` is true."""
        count = self("ReduceSum", self.cast(wrong, ir.DataType.FLOAT), keepdims=0)
        count.shape = ir.Shape([])
        assert count.name is not None  # written above
        self._alarms[count.name] = text
        self._graph.graph.outputs.append(count)
