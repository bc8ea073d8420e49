"""Write nodes and constants into an ONNX graph that is being rewritten.

``onnx_ir.tape.Tape`` writes nodes at the end of a graph and leaves names to chance; here a node
goes next to another one, and names are part of the file's format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[Any]

_SERIES = "lightning_qat.initializer_names"


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
    array = np.array(array, order="C")
    series = _series_of(graph)
    if name in graph.initializers:
        if _holds(graph.initializers[name], array):
            return graph.initializers[name]
        values = name, array.dtype.str, array.shape, sha256(array.tobytes()).digest()
        known = graph.initializers.get(series.named.get(values, ""))
        if known is not None and _holds(known, array):
            return known
        name = series.next_name(name)
        series.named[values] = name
    value = _constant(name, ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


class _Series:
    """Names with numbers behind them that ``initializer`` has given out, and for which values."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.named: dict[tuple[Any, ...], str] = {}
        self._count: dict[str, int] = {}

    def next_name(self, wanted: str) -> str:
        count = self._count.get(wanted, 0) + 1
        while f"{wanted}_{count}" in self.graph.initializers:
            count += 1
        self._count[wanted] = count
        return f"{wanted}_{count}"


def _series_of(graph: ir.Graph) -> _Series:
    """The names given out in a graph; a copy of a graph has those of its original at first."""
    series = graph.meta.get(_SERIES)
    if not isinstance(series, _Series) or series.graph is not graph:
        series = graph.meta[_SERIES] = _Series(graph)
    return series


def _holds(value: ir.Value, array: Array) -> bool:
    stored = array_of(value)
    return stored is not None and stored.dtype == array.dtype and np.array_equal(stored, array)


class Names:
    """Names that are taken.

    Args:
        taken: Those that are taken from the beginning.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._count: dict[str, int] = {}

    def add(self, names: Iterable[str]) -> None:
        """Names that are taken, too."""
        self._taken.update(names)

    def take(self, name: str) -> str:
        """Return ``name``, or ``name_1``, ``name_2``, ... if taken, and take it.

        >>> names = Names(["fc"])
        >>> names.take("fc"), names.take("fc")
        ('fc_1', 'fc_2')
        """
        candidate = name
        # Names are never given back, so what was taken once need not be tried again.
        count = self._count.get(name, 0)
        while candidate in self._taken:
            count += 1
            candidate = f"{name}_{count}"
        self._count[name] = count
        self._taken.add(candidate)
        return candidate


class GraphWriter:
    """Inserts named nodes into a graph, and constants once the names they take are free."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._constants: list[ir.Value] = []
        self._places: dict[ir.Value, list[int]] | None = None
        """Where the graph's outputs stand, found when one is first replaced."""

    def constant(self, name: str, values: Array | np.generic | ir.LazyTensor) -> ir.Value:
        """A constant that ``register_constants`` makes an initializer of that name."""
        tensor = values if isinstance(values, ir.LazyTensor) else ir.Tensor(np.asarray(values))
        value = _constant(name, tensor)
        self._constants.append(value)
        return value

    def register_constants(self) -> None:
        """Make every constant that is read an initializer, with a name that is not taken."""
        names = Names(v.name for v in self.graph.inputs if v.name)
        names.add(self.graph.initializers)
        names.add(v.name for node in self.graph for v in node.outputs if v.name)
        for value in self._constants:
            if value.uses():
                assert value.name is not None
                value.name = names.take(value.name)
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
        if old.is_graph_output():
            self._replace_output(old, new)

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        if self._places is None:
            self._places = {}
            for index, output in enumerate(self.graph.outputs):
                self._places.setdefault(output, []).append(index)
        for index in self._places.pop(old, ()):
            self.graph.outputs[index] = new
            self._places.setdefault(new, []).append(index)


def _constant(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
