"""Compute a graph node by node: what does not fit names the node, and memory has a limit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from lightning_qat_exporters.cann.executor.domain import Array, NodeRefused, allocate_at_most

MOST_REPEATS = 20_000
"""A Loop may repeat its body so many times: that of EmbeddingBag does once for each bag."""
_FEW = 64
"""Numbers in a tensor that may be a size."""
_NO_MORE_THAN_READ = frozenset(
    {"EyeLike", "LayerNormalization", "RegexFullMatch", "Slice", "Split"}
)
"""Operators on which onnx's inference may end the process, as on GatherND, if arrays do not fit."""


class Evaluation:
    """One computation of a graph.

    Args:
        max_bytes: Most bytes that all tensors may take which are there at one time.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes

    def outputs(self, graph: ReferenceEvaluator, given: Mapping[str, Array]) -> list[Array]:
        """Compute the outputs of a graph.

        Raises:
            ValueError: A node cannot be computed from what it reads, or would make more than
                ``max_bytes``; it is named.
        """
        values: dict[str, Any] = {"": None, **graph.rt_inits_, **given}
        readers = Counter(name for node in graph.rt_nodes_ for name in _read_by(node.onnx_node))
        names = list(map(str, graph.output_names))
        readers.update(names)
        # Kept as a number: adding all tensors up for each node takes time with their square.
        taken = sum(map(_bytes, values.values()))
        for node in graph.rt_nodes_:
            proto = node.onnx_node
            inputs = [values[name] for name in node.input]
            made = self._made(node, inputs, values, taken)
            for name, value in zip(node.output, made, strict=False):
                if name:  # else nobody reads it, and an input without a name stays nothing
                    taken += _bytes(value) - _bytes(values.get(name))
                    values[name] = value
            for name in _read_by(proto):
                readers[name] -= 1
                if not readers[name] and name and name not in graph.rt_inits_:
                    taken -= _bytes(values.pop(name, None))
        return [values[name] for name in names]

    def _made(
        self, node: Any, inputs: list[Any], values: Mapping[str, Any], taken: int
    ) -> Iterable[Array | None]:
        label = node.onnx_node.name or next(iter(node.output), "") or node.op_type
        try:
            if node.op_type == "If":
                return self._branch(node, inputs[0], values)
            left = self._max_bytes - taken
            needed = _bytes_made(node, inputs)
            if needed > left:
                raise NodeRefused(
                    f"All tensors may take at most {self._max_bytes} bytes; {label!r} "
                    f"({node.op_type}) would make one of {needed}. If that is meant, allow it: "
                    "AscendExecutor(model, max_bytes=...)."
                )
            with allocate_at_most(left), np.errstate(all="ignore"):
                if node.op_type == "Loop":
                    return _loop(node, inputs, values)
                made: Iterable[Array | None] = node.run(*inputs)
            return made
        except (NodeRefused, MemoryError):
            raise
        # NumPy and onnx's operators raise many kinds, for one and the same reason.
        except Exception as error:
            told = ", ".join(map(_told, inputs))
            raise NodeRefused(
                f"{label!r} ({node.op_type}) cannot be computed from {told}: {_first_line(error)}"
            ) from error

    def _branch(self, node: Any, condition: Array, values: Mapping[str, Any]) -> list[Array]:
        if np.size(condition) != 1:
            raise ValueError("the condition of If must be one truth value")
        branch = node.then_branch if np.asarray(condition).item() else node.else_branch
        # A branch may read everything outside it, and its own tensors count with those.
        return self.outputs(branch, {name: v for name, v in values.items() if name})


def _loop(node: Any, inputs: list[Any], values: Mapping[str, Any]) -> Iterable[Array | None]:
    count, condition, *carried = inputs
    # No condition is one that holds; the body may read everything outside it.
    condition = np.asarray(True) if condition is None else condition
    outside = {name: value for name, value in values.items() if name}
    with _repeated_at_most(node, MOST_REPEATS):
        made: Iterable[Array | None] = node.run(count, condition, *carried, context=outside)
    return made


@contextmanager
def _repeated_at_most(node: Any, times: int) -> Iterator[None]:
    """Let the body of a Loop run so many times, inside a ``with`` block."""
    run, left = node._run_body, iter(range(times))

    def counted(*args: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise ValueError(f"it repeats its body more than {times} times")
        return run(*args, **options)

    node._run_body = counted
    try:
        yield
    finally:
        node._run_body = run


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The names that a node reads, its branches as well."""
    yield from node.input
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.HasField("g") else attribute.graphs
        for graph in graphs:
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from _read_by(inner)


def _bytes_made(node: Any, inputs: list[Any]) -> int:
    """Bytes of what a node will make, as ONNX's inference of shapes tells; 0 where it does not."""
    proto = node.onnx_node
    if not onnx.defs.has(proto.op_type) or proto.op_type in _NO_MORE_THAN_READ:
        return 0  # Ascend's keep their input's shape
    if proto.op_type == "GatherND":
        return _bytes_gathered(*inputs[:2])
    version = node.run_params["opsets"].get("", 1)
    plain = onnx.NodeProto()
    plain.CopyFrom(proto)
    plain.domain = ""
    types, data = {}, {}
    for name, value in zip(proto.input, inputs, strict=True):
        if not name or not isinstance(value, np.ndarray | np.generic):
            continue
        kind = onnx.TensorProto.FLOAT if value.dtype.kind in "iu" else 0
        if node.op_domain == "" or not kind:
            kind = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        types[name] = onnx.helper.make_tensor_type_proto(kind, value.shape)
        if value.size <= _FEW:
            data[name] = onnx.numpy_helper.from_array(np.asarray(value), name)
    try:
        schema = onnx.defs.get_schema(proto.op_type, version)
        made = onnx.shape_inference.infer_node_outputs(
            schema, plain, types, data, opset_imports=[onnx.helper.make_opsetid("", version)]
        )
    except Exception:  # what does not fit, the computation says in terms of the arrays
        return 0
    return sum(_declared_bytes(type_.tensor_type) for type_ in made.values())


def _bytes_gathered(data: Array, indices: Array) -> int:
    """A slice of the data for each row of indices; as much as the data at most."""
    picked = indices.shape[-1] if indices.ndim else 0
    rows = indices.size // picked if picked else indices.size
    return int(rows * data.itemsize * math.prod(data.shape[picked:]))


def _declared_bytes(tensor: onnx.TypeProto.Tensor) -> int:
    sizes = [d.dim_value for d in tensor.shape.dim]
    # Not known in advance: no more than what is read.
    return 8 * math.prod(sizes) if all(size >= 0 for size in sizes) else 0


def _bytes(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray | np.generic) else 0


def _told(value: Any) -> str:
    if isinstance(value, np.ndarray | np.generic):
        return f"{value.dtype} {list(value.shape)}"
    return "nothing" if value is None else type(value).__name__


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    text = str(cause).strip().partition("\n")[0]
    return text[:200] or type(cause).__name__
