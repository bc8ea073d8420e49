"""Whether every tensor is made once, and before it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx import FunctionProto, GraphProto, NodeProto

from lightning_qat_exporters.onnx_files.nested import subgraphs


def check_order(graph: GraphProto, path: str) -> None:
    """Check that nodes are sorted, have no cycle and make what is read, in subgraphs as well.

    Args:
        graph: The main graph.
        path: Its file, for messages.

    Raises:
        ValueError: Nodes are not sorted, a tensor is made twice or by nothing, or an input or
            output has no name; node and tensor are named.
    """
    _check_graph(graph, {""}, repr(path))


def check_function_order(function: FunctionProto, path: str) -> None:
    """Check the nodes of a function, which reads nothing from outside.

    Raises:
        ValueError: As `check_order`; or an output of the function is one of its inputs.
    """
    place = f"the function {function.name!r} of {path!r}"
    if "" in function.input:
        raise ValueError(f"Every input must have a name; one of {place} has none.")
    made = {"", *function.input}
    _check_nodes(function.node, made, set(), place)
    for name in function.output:
        if name in function.input:
            raise ValueError(
                f"A function must make its outputs; {place} gives its input {name!r} back. Write "
                "an Identity node between them."
            )
        _check_output(name, made, place)


def _check_graph(graph: GraphProto, made: set[str], place: str) -> None:
    """Check one graph; what it makes is taken out of ``made`` again."""
    if any(not value.name for value in graph.input):
        raise ValueError(f"Every input must have a name; one of {place} has none.")
    own = {value.name for value in (*graph.input, *graph.initializer)}
    own |= {tensor.values.name for tensor in graph.sparse_initializer}
    own -= made
    made |= own
    _check_nodes(graph.node, made, own, place)
    for value in graph.output:
        _check_output(value.name, made, place)
    made -= own - {""}


def _check_nodes(nodes: Sequence[NodeProto], made: set[str], own: set[str], place: str) -> None:
    """Check nodes in their order, and add what they make to ``made`` and ``own``."""
    for node in nodes:
        for name in node.input:
            if name not in made:
                raise ValueError(_unmade(node, name, nodes, place))
        for subgraph in subgraphs(node):
            _check_graph(subgraph, made, place)
        for name in node.output:
            if name and name in made:
                raise ValueError(
                    f"Every tensor must be made once; in {place} the node {_name(node)} makes "
                    f"{name!r}, which is there already."
                )
            made.add(name)
            own.add(name)


def _check_output(name: str, made: set[str], place: str) -> None:
    if not name:
        raise ValueError(f"Every output must have a name; one of {place} has none.")
    if name not in made:
        raise ValueError(f"Nothing in {place} makes the output {name!r}.")


def _unmade(node: NodeProto, name: str, nodes: Sequence[NodeProto], place: str) -> str:
    maker = {output: node for node in nodes for output in node.output}
    reads = f"In {place} the node {_name(node)} reads the tensor {name!r}, "
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
