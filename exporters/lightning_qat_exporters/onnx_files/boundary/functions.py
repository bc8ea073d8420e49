"""Whether the functions of a model call each other without end, or too often to be inlined."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import chain
from typing import NamedTuple

from onnx import FunctionProto, ModelProto, NodeProto

from lightning_qat_exporters.onnx_files.boundary.order import check_function_order
from lightning_qat_exporters.onnx_files.nested import all_nodes

MOST_NODES = 1_000_000
"""Nodes of a model whose functions are inlined: twenty functions that call the next one twice make
a million of twenty."""
DEEPEST = 64
"""Calls within calls; PyTorch's exporters nest as deep as modules do."""

_Id = tuple[str, str, str]


def check_functions(proto: ModelProto, path: str) -> None:
    """Check that functions are defined once and end, before they are inlined.

    Raises:
        ValueError: A function calls itself, directly or not, calls are nested too deep, a call
            has more inputs or outputs than its function, a body is out of order, an attribute
            refers to none of its function, or the inlined model would be too large; function or
            node is named.
    """
    functions: dict[_Id, FunctionProto] = {}
    _check_references(proto.graph.node, (), repr(path))
    for function in proto.functions:
        key = _key(function.domain, function.name, function.overload)
        if key in functions:
            raise ValueError(
                f"Every function must be defined once; {path!r} has {_told(key)} twice."
            )
        functions[key] = function
        check_function_order(function, path)
        own = {*function.attribute, *(attribute.name for attribute in function.attribute_proto)}
        _check_references(function.node, own, f"the function {_told(key)} of {path!r}")
    if not functions:
        return
    bodies = (proto.graph.node, *(function.node for function in proto.functions))
    for node in chain.from_iterable(map(all_nodes, bodies)):
        called = functions.get(_key_of(node))
        if called is not None:
            _check_call(node, called, path)
    measured: dict[_Id, _Inlined] = {}
    for key in functions:
        _measure(key, functions, measured, (), path)
    total = sum(measured[key].nodes if key in measured else 1 for key in _called(proto.graph.node))
    if total > MOST_NODES:
        raise ValueError(
            f"A model must have at most {MOST_NODES} nodes when its functions are inlined; "
            f"{path!r} would have {total}."
        )


class _Inlined(NamedTuple):
    """A function with all that it calls."""

    nodes: int
    depth: int


def _measure(
    key: _Id,
    functions: Mapping[_Id, FunctionProto],
    measured: dict[_Id, _Inlined],
    callers: tuple[_Id, ...],
    path: str,
) -> _Inlined:
    if key in measured:
        return measured[key]
    if key in callers:
        cycle = " -> ".join(map(_told, (*callers[callers.index(key) :], key)))
        raise ValueError(f"Functions must not call themselves; in {path!r} {cycle} does.")
    nodes, depth = 0, 1 + len(callers)
    if depth <= DEEPEST:
        depth = 1
        for other in _called(functions[key].node):
            if other in functions:
                inner = _measure(other, functions, measured, (*callers, key), path)
                nodes, depth = nodes + inner.nodes, max(depth, 1 + inner.depth)
            else:
                nodes += 1
    if depth > DEEPEST:
        raise ValueError(
            f"Calls of functions must be nested at most {DEEPEST} deep; in {path!r} those of "
            f"{_told(key)} are deeper."
        )
    measured[key] = _Inlined(nodes, depth)
    return measured[key]


def _called(nodes: Iterable[NodeProto]) -> Iterator[_Id]:
    """The operators of nodes, in subgraphs as well."""
    return map(_key_of, all_nodes(nodes))


def _check_call(node: NodeProto, function: FunctionProto, path: str) -> None:
    """What a call leaves out at its end is empty; more than the function has, nothing takes."""
    for kind, given, own in (
        ("inputs", node.input, function.input),
        ("outputs", node.output, function.output),
    ):
        if len(given) > len(own):
            raise ValueError(
                f"A call must have at most the {len(own)} {kind} of its function "
                f"{_told(_key_of(node))}; the node {node.name!r} of {path!r} has {len(given)}."
            )


def _check_references(nodes: Iterable[NodeProto], own: Collection[str], place: str) -> None:
    """Attributes refer to those of the function that they stand in."""
    for node in all_nodes(nodes):
        for attribute in node.attribute:
            if attribute.ref_attr_name and attribute.ref_attr_name not in own:
                raise ValueError(
                    f"An attribute may refer to one of its function alone; {attribute.name!r} of "
                    f"the node {node.name!r} ({node.op_type}) in {place} refers to "
                    f"{attribute.ref_attr_name!r}."
                )


def _key_of(node: NodeProto) -> _Id:
    return _key(node.domain, node.op_type, node.overload)


def _key(domain: str, name: str, overload: str) -> _Id:
    return "" if domain == "ai.onnx" else domain, name, overload


def _told(key: _Id) -> str:
    return repr(f"{key[0]}.{key[1]}" if key[0] else key[1])
