"""Compute once what depends on no input: positions, masks of windows, packed biases, tables."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from lightning_qat.ir.exported_program import Constants, is_view, module_path, writes_in_place
from lightning_qat.ir.operators import value_preserving
from lightning_qat.ir.ops import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    key_of,
    layer_of_weight_key,
    layer_operands,
)

_ATEN = torch.ops.aten
_CHECK = _ATEN._assert_tensor_metadata.default
_FILLED: dict[Any, Callable[[fx.Node], Any]] = {
    _ATEN.new_zeros.default: lambda node: 0,
    _ATEN.zeros_like.default: lambda node: 0,
    _ATEN.new_ones.default: lambda node: 1,
    _ATEN.ones_like.default: lambda node: 1,
    _ATEN.new_full.default: lambda node: node.args[2],
    _ATEN.full_like.default: lambda node: node.args[1],
}
"""Operators that read of a tensor its size and type alone, and the number they fill theirs with."""
_KEEP_VALUES = {*value_preserving("aten"), "cat", "stack", "embedding", "where"}
_SMALL = 1 << 20
"""So many elements are stored even if they are made of a single number."""


def fold_constants(program: ExportedProgram) -> None:
    """Replace every tensor that depends on no input by a constant, in place.

    What is quantized stays, and so does what an exported output returns. Writes in place into
    tensors that depend on no input (Swin's masks) are carried out in their order. A constant is
    stored if it is small, or no larger than four times what it is made of.
    """
    quantized = {node for node in program.graph.nodes if key_of(node) is not None}
    _fold(program, quantized)


def fold_constant_layers(program: ExportedProgram, recurrent: Collection[str]) -> tuple[str, ...]:
    """Replace every layer that depends on no input by a constant, in place.

    Swin V2 computes the biases of its attention with a small network from the positions alone. The
    numbers are those of training; exporters and runtimes would compute them once themselves, and
    the layers would then be missing in the file.

    Args:
        program: With final numbers: layers read ``fake_quantize`` and ``dequantize`` nodes.
        recurrent: Paths of recurrent layers, which keep their first steps.

    Returns:
        The layers that are constants now, in the order of the graph. A layer that is also called
        on what depends on an input is none of them.
    """
    before = _layers(program.graph)
    _fold(program, {node for node in program.graph.nodes if module_path(node) in recurrent})
    after = _layers(program.graph)
    return tuple(name for name in before if name not in after)


def _layers(graph: fx.Graph) -> list[str]:
    calls = filter(None, map(layer_operands, graph.nodes))
    return list(dict.fromkeys(layer_of_weight_key(weight.key) for _, weight in calls))


def _fold(program: ExportedProgram, kept: set[fx.Node]) -> None:
    """Compute what can be but the nodes to keep, and let all others read constants instead."""
    constants = Constants(program)
    folded = _foldable(program.graph, constants, kept)
    writes = any(writes_in_place(node) for node in folded)
    values: dict[fx.Node, Any] = {}
    stored: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in list(program.graph.nodes):
        known = constants.value(node)
        if known is not None:
            values[node] = known.clone() if writes else known
        elif node in folded:
            values[node] = _value(node, values)
        elif node.target is _CHECK and node.args[0] in folded:
            program.graph.erase_node(node)
        else:
            for before in node.all_input_nodes:
                if before in folded:
                    node.replace_input_with(before, _stored(before, values, stored, constants))
    for node in reversed(list(program.graph.nodes)):
        if node in folded:
            program.graph.erase_node(node)


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.target in _FILLED:
        like = node.meta["val"]
        return torch.full(like.shape, _FILLED[node.target](node), dtype=like.dtype)
    args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
    target: Any = node.target
    with torch.no_grad():
        return target(*args, **kwargs)


def _stored(
    node: fx.Node,
    values: dict[fx.Node, Any],
    stored: dict[tuple[fx.Node, int], fx.Node],
    constants: Constants,
) -> fx.Node:
    """The constant of what a node holds now; a later write in place makes another one."""
    value: Tensor = values[node]
    key = node, value._version
    if key not in stored:
        # A module may have methods of the operator's name: ``to``, ``float``.
        name = f"{module_path(node)}.{node.name}_folded".lstrip(".")
        stored[key] = constants.add(
            name, value.detach().clone(memory_format=torch.contiguous_format)
        )
    return stored[key]


def _foldable(graph: fx.Graph, constants: Constants, kept: set[fx.Node]) -> set[fx.Node]:
    """The nodes that can be computed now, in a way that no other node notices."""
    integers = _integers(graph)
    while True:
        folded = _computable(graph, constants, kept)
        more: set[fx.Node] = set()
        written = [node for node in folded if writes_in_place(node)]
        for node in folded:
            outside = [user for user in node.users if user not in folded]
            shared = [user for user in outside if is_view(user) and any(user < w for w in written)]
            if shared or any(map(writes_in_place, outside)):
                # Memory is written that others read; it may be that of what the node is a view of.
                more |= {node, *(n for n in _before(node) if n in folded)}
            elif outside and (node in integers or _must_stay(node, outside)):
                more.add(node)
        if not more:
            return folded
        kept = kept | more


def _integers(graph: fx.Graph) -> set[fx.Node]:
    """Quantized tensors, and those that hold values of them: views, selections, tables."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        read = any(before in found for before in node.all_input_nodes)
        if key_of(node) is not None or (read and _keeps_values(node.target)):
            found.add(node)
    return found


def _keeps_values(target: Any) -> bool:
    packet = getattr(target, "overloadpacket", None)
    return target is operator.getitem or getattr(packet, "__name__", "") in _KEEP_VALUES


def _before(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = set(waiting.pop().all_input_nodes) - found
        found |= new
        waiting += new
    return found


def _computable(graph: fx.Graph, constants: Constants, kept: set[fx.Node]) -> set[fx.Node]:
    """The calls whose arguments are constants and numbers, and that are the same at every run."""
    folded: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in kept:
            continue
        if not (_is_repeatable(node.target) and _gives_tensors(node)):
            continue
        read = [] if _is_filled_alone(node) else node.all_input_nodes
        if all(
            n in folded or (constants.value(n) is not None and not writes_in_place(node))
            for n in read
        ):
            folded.add(node)
    return folded


def _is_filled_alone(node: fx.Node) -> bool:
    """Whether a node fills a tensor with a number that is known now.

    Not the initial state of a recurrent layer, which targets with such layers take as an operand.
    """
    if node.target not in _FILLED or isinstance(_FILLED[node.target](node), fx.Node):
        return False
    readers = {reader for user in node.users for reader in (user, *user.users)}
    return not any("lightning_qat" in str(reader.target) for reader in readers)


def _must_stay(node: fx.Node, outside: list[fx.Node]) -> bool:
    """Whether a node that could be computed is not stored: an output, several tensors, a large one.

    Stored are tensors of few elements, or of up to four times those that they are made of.
    """
    value = node.meta["val"]
    if not isinstance(value, Tensor) or any(user.op == "output" for user in outside):
        return True
    if value.numel() <= _SMALL:
        return False
    sources = (n.meta["val"] for n in _before(node) if n.op == "placeholder")
    return bool(value.numel() > 4 * sum(source.numel() for source in sources))


def _is_repeatable(target: Any) -> bool:
    if target in (FAKE_QUANTIZE, DEQUANTIZE):
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    seeded = torch.Tag.nondeterministic_seeded in target.tags
    return bool(target.namespace == "aten") and not seeded


def _gives_tensors(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return bool(leaves) and all(
        isinstance(leaf, Tensor) and all(isinstance(size, int) for size in leaf.shape)
        for leaf in leaves
    )
