"""Whether every tensor is made once, and before it is read."""

from __future__ import annotations

from collections.abc import Mapping

from onnx import GraphProto, NodeProto

from lightning_qat_exporters.onnx_files.nested import subgraphs


def check_order(graph: GraphProto, path: str) -> None:
    """Check that nodes are sorted, have no cycle and make what is read, in subgraphs as well.

    Args:
        graph: The main graph.
        path: Its file, for messages.

    Raises:
        ValueError: Nodes are not sorted, or a tensor is made twice or by nothing; node and tensor
            are named.
    """
    _check(graph, {""}, path)


def _check(graph: GraphProto, made: set[str], path: str) -> None:
    """Check one graph; what it makes is taken out of ``made`` again."""
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    own -= made
    made |= own
    for node in graph.node:
        for name in node.input:
            if name not in made:
                raise ValueError(_unmade(node, name, graph, path))
        for subgraph in subgraphs(node):
            _check(subgraph, made, path)
        for name in node.output:
            if name and name in made:
                raise ValueError(
                    f"Every tensor must be made once; in {path!r} the node {_name(node)} makes "
                    f"{name!r}, which is there already."
                )
            made.add(name)
            own.add(name)
    for value in graph.output:
        if value.name not in made:
            raise ValueError(f"Nothing in {path!r} makes the output {value.name!r}.")
    made -= own - {""}


def _unmade(node: NodeProto, name: str, graph: GraphProto, path: str) -> str:
    maker = {output: node for node in graph.node for output in node.output}
    reads = f"In {path!r} the node {_name(node)} reads the tensor {name!r}, "
    if name not in maker:
        return f"{reads}which nothing makes."
    if _reaches(node, maker[name], maker):
        return (
            f"{reads}which {_name(maker[name])} makes from its own output: a graph must have no "
            "cycle."
        )
    return (
        f"{reads}which {_name(maker[name])} makes only later: nodes must be sorted so that every "
        "tensor is made before it is read."
    )


def _reaches(start: NodeProto, end: NodeProto, maker: Mapping[str, NodeProto]) -> bool:
    """Whether ``end`` reads, directly or not, an output of ``start``."""
    outputs, waiting, seen = set(start.output), [end], set[int]()
    while waiting:
        node = waiting.pop()
        if outputs & set(node.input):
            return True
        before = (maker[name] for name in node.input if name in maker)
        fresh = [n for n in before if id(n) not in seen]
        seen.update(map(id, fresh))
        waiting += fresh
    return False


def _name(node: NodeProto) -> str:
    return f"{node.name or (node.output[0] if node.output else '')!r} ({node.op_type})"
