"""Decompose the few operators that ONNX does not know, and leave the rest of a graph untouched.

``ExportedProgram.run_decompositions`` traces a whole program anew, about 20 ms per operator, to
find the handful that it replaces; of deep models that was most of the time of an export. Here each
of them is traced alone and put in its place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from lightning_qat.ir.exported_program import clean_up, writes_in_place
from lightning_qat.ir.make_functional import make_functional

_STRIDES = torch.ops.aten.as_strided_.default

Table = Mapping[Any, Callable[..., Any]]


def decomposed(program: ExportedProgram, table: Table, known: Collection[Any]) -> ExportedProgram:
    """A program without the operators of a table, as ``run_decompositions`` makes it.

    Args:
        program: The program of an eval-mode forward; it is changed.
        table: Overload to a function of the same arguments, in terms of other operators.
        known: Overloads that ONNX knows. Of all others those that torch itself defines by other
            operators are replaced by these.

    Returns:
        The program. Where it writes into tensors that have other names, or has graphs within its
        graph, torch's own ``run_decompositions`` does the work.
    """
    if not all(_stands_alone(node) for node in program.graph.nodes):
        whole: ExportedProgram = program.run_decompositions(dict(table))
        return whole
    # Of the program's own tensors: its sizes are those that they have.
    mode = detect_fake_mode([node.meta.get("val") for node in program.graph.nodes])
    for node in list(program.graph.nodes):
        if node.op != "call_function" or node.target in known:
            continue
        if node.target in table or _is_composite(node.target):
            _replace(node, table, mode)
    clean_up(program)
    return program


def _stands_alone(node: fx.Node) -> bool:
    """Whether a node writes into no tensor and holds no graph of its own."""
    if isinstance(node.target, torch._ops.HigherOrderOperator) or node.op == "get_attr":
        return False
    return not writes_in_place(node)


def _is_composite(target: Any) -> bool:
    """Whether torch defines an operator by other operators, such as ``to`` by ``_to_copy``."""
    return isinstance(target, torch._ops.OpOverload) and target.has_kernel_for_dispatch_key(
        torch._C.DispatchKey.CompositeImplicitAutograd
    )


def _replace(node: fx.Node, table: Table, mode: Any) -> None:
    """Trace what an operator is made of, and put that in its place."""
    values = pytree.tree_map_only(fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    leaves, tree = pytree.tree_flatten((node.args, node.kwargs))
    read = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]
    fixed = pytree.tree_leaves(values)
    target: Any = node.target
    made_of = table.get(target, target)

    def call(*tensors: Any) -> Any:
        filled = list(fixed)
        for place, tensor in zip(places, tensors, strict=True):
            filled[place] = tensor
        args, kwargs = pytree.tree_unflatten(filled, tree)
        return made_of(*args, **kwargs)

    with mode:
        fakes = [n.meta["val"] for n in read]
        traced = make_fx(call, decomposition_table=dict(table))(*fakes)
        if any(_writes_values(inner) for inner in traced.graph.nodes):
            # Some of torch's own decompositions write in place (RMSNorm adds its epsilon so).
            pure = make_fx(call)(*fakes)
            make_functional(pure.graph)
            pure.recompile()
            traced = make_fx(pure, decomposition_table=dict(table))(*fakes)
    with node.graph.inserting_before(node):
        copies: dict[fx.Node, fx.Node] = dict(zip(_placeholders(traced), read, strict=True))
        for inner in traced.graph.nodes:
            if inner.target is _STRIDES:
                # Of a pool that gives one number each: the strides of a picture in NHWC.
                copies[inner] = copies[inner.args[0]]
            elif inner.op == "call_function":
                copies[inner] = node.graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta = {**node.meta, "val": inner.meta.get("val")}
    result: Any = traced.graph.output_node().args[0]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(copies[result])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            number: Any = user.args[1]
            user.replace_all_uses_with(copies[result[number]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _writes_values(node: fx.Node) -> bool:
    return writes_in_place(node) and node.target is not _STRIDES


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.op == "placeholder"]
