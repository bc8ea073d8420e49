"""Write nodes and constants into an ONNX graph that is being rewritten.

``onnx_ir.tape.Tape`` writes nodes at the end of a graph and leaves names to chance; here a node
goes next to another one, and names are part of the file's format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]


def typed(attributes: Mapping[str, Any]) -> list[ir.Attr]:
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


def array_of(value: ir.Value | None) -> Array | None:
    """The array of a constant; ``None`` when the value is computed at run time."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
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
    value = _constant(name, ir.tensor(np.array(array, order="C"), name=name))
    graph.register_initializer(value)
    return value


def unique(name: str, taken: set[str]) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, ... if taken, and take it.

    >>> taken = {"fc"}
    >>> unique("fc", taken), unique("fc", taken)
    ('fc_1', 'fc_2')
    """
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


class GraphWriter:
    """Inserts named nodes into a graph, and constants once the names they take are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: list[ir.Value] = []

    def constant(self, name: str, values: Array | np.generic | ir.LazyTensor) -> ir.Value:
        """A constant that ``register_constants`` makes an initializer of that name."""
        tensor = values if isinstance(values, ir.LazyTensor) else ir.Tensor(np.asarray(values))
        value = _constant(name, tensor)
        self._constants.append(value)
        return value

    def register_constants(self) -> None:
        """Make every constant that is read an initializer, with a name that is not taken."""
        taken = {v.name for v in (*self.graph.inputs, *self.graph.initializers.values()) if v.name}
        taken |= {v.name for node in self.graph for v in node.outputs if v.name}
        for value in self._constants:
            if value.uses():
                assert value.name is not None
                value.name = unique(value.name, taken)
                self.graph.register_initializer(value)

    def insert(
        self,
        anchor: ir.Node,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        name: str,
        *,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
        output: ir.Value | None = None,
        after: bool = False,
    ) -> ir.Value:
        """Insert a node before ``anchor``, or after it.

        Args:
            anchor: A node of the graph.
            op_type: Operator of the default domain.
            inputs: The node's inputs.
            attributes: int, float, str or list of int, by name.
            name: The node's name.
            dtype: Type of the output.
            output: The output; else it is ``<name>.output0`` with the shape of the first input.
            after: Insert behind ``anchor``.

        Returns:
            The node's output.
        """
        if output is None:
            shape = None if inputs[0] is None else inputs[0].shape
            type_ = None if dtype is None else ir.TensorType(dtype)
            output = ir.Value(name=f"{name}.output0", type=type_, shape=shape)
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

    def replace(
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
            dtype = new.dtype or ir.DataType.FLOAT
            new = self.insert(anchor, "Identity", [new], {}, f"{new.name}.copy", dtype=dtype)
        if old.is_graph_output():
            new.name, old.name = old.name, None
        for user, index in old.uses() if uses is None else uses:
            if user is not new.producer():
                user.replace_input_with(index, new)
        for index, output in enumerate(self.graph.outputs):
            if output is old:
                self.graph.outputs[index] = new


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
