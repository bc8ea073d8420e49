"""Read and change the constants of an exported program.

``torch.export`` lifts parameters and buffers to inputs of the graph and keeps their values beside
it; these functions keep the graph, its signature and the values in step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.utils import _pytree as pytree

_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


class Constants:
    """The constants of a program by the nodes that stand for them.

    torch finds the name of one constant by a walk over all of them; here one walk finds all.

    Args:
        program: The program; nothing else may change its constants meanwhile.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._names = {
            spec.arg.name: str(spec.target)
            for spec in program.graph_signature.input_specs
            if spec.kind in _KINDS
        }
        self._first = next(iter(program.graph.nodes))
        self._added = 0

    def name(self, node: object) -> str | None:
        """The name under which a node's value is stored; ``None``: it is no constant."""
        if not isinstance(node, fx.Node) or node.op != "placeholder":
            return None
        return self._names.get(node.name)

    def value(self, node: object) -> Tensor | None:
        """The value of a constant node; ``None`` when the node is computed at run time."""
        name = self.name(node)
        if name is None:
            return None
        value = self._program.state_dict.get(name, self._program.constants.get(name))
        return value.detach() if isinstance(value, Tensor) else None

    def add(self, name: str, value: Tensor) -> fx.Node:
        """Add a constant to the program.

        Args:
            name: Dotted name; ``_1`` and so on is appended to one that is in use.
            value: Its value.

        Returns:
            The graph's node of the constant.
        """
        program, wanted, number = self._program, name, 0
        while name in program.state_dict or name in program.constants:
            number += 1
            name = f"{wanted}_{number}"
        with program.graph.inserting_before(self._first):
            node: fx.Node = program.graph.placeholder("b_" + name.replace(".", "_"))
        node.meta["val"] = self._fake_mode.from_tensor(value, static_shapes=True)
        spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
        # The signature lists inputs in the order of their nodes.
        program.graph_signature.input_specs.insert(self._added, spec)
        self._added += 1
        program.state_dict[name] = value
        self._names[node.name] = name
        return node

    @cached_property
    def _fake_mode(self) -> Any:
        values = (node.meta.get("val") for node in self._program.graph.nodes)
        return next(value.fake_mode for value in values if hasattr(value, "fake_mode"))


def copied(program: ExportedProgram) -> ExportedProgram:
    """A copy with a graph and a signature of its own; the values of constants are the same."""
    values = (*program.state_dict.values(), *program.constants.values())
    with warnings.catch_warnings():
        # torch's own use of its own deprecated LeafSpec.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        # What a copier takes for copied already it takes as it is.
        copied = copy.deepcopy(program, {id(value): value for value in values})
    # fx gives another name to the copy of an input that is called as a builtin is, such as `input`.
    inputs = (node for node in copied.graph.nodes if node.op == "placeholder")
    for node, spec in zip(inputs, copied.graph_signature.input_specs, strict=True):
        node.name = spec.arg.name
    return copied


def clean_up(program: ExportedProgram) -> None:
    """Remove dead nodes and constants of a changed graph and update its signature, in place."""
    program.graph.eliminate_dead_code()
    outputs: Any = program.graph.output_node().args[0]
    for output, value in zip(program.graph_signature.output_specs, outputs, strict=True):
        if isinstance(value, fx.Node):
            output.arg = TensorArgument(value.name)
    constants, unused = Constants(program), {}
    for node in program.graph.nodes:
        name = None if node.users else constants.name(node)
        if name is not None:
            unused[node] = name
    gone = {node.name for node in unused}
    for node in unused:
        program.graph.erase_node(node)
    specs = program.graph_signature.input_specs
    specs[:] = [
        spec
        for spec in specs
        if not (isinstance(spec.arg, TensorArgument) and spec.arg.name in gone)
    ]
    still_named = {spec.target for spec in specs}
    for name in unused.values():
        if name not in still_named:
            program.state_dict.pop(name, None)
            program.constants.pop(name, None)
    program.graph.lint()
    program.graph_module.recompile()


@contextmanager
def with_plain_outputs(program: ExportedProgram) -> Iterator[ExportedProgram]:
    """The program with dicts in the place of named tuples, which torch does not write to a file.

    Inside the block the program returns a dict of the fields; afterwards it is as before.
    """
    signature: Any = program.module_call_graph[0].signature
    before = signature.out_spec
    numbered = pytree.tree_unflatten(list(range(before.num_leaves)), before)
    signature.out_spec = pytree.tree_structure(_without_named_tuples(numbered))
    try:
        yield program
    finally:
        signature.out_spec = before


def _without_named_tuples(value: Any) -> Any:
    fields: Any = getattr(value, "_asdict", None)
    if isinstance(value, tuple) and fields is not None:
        return {name: _without_named_tuples(item) for name, item in fields().items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_named_tuples, value))
    if type(value) is dict:
        return {key: _without_named_tuples(item) for key, item in value.items()}
    return value


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operator writes into a tensor that it reads, as ``relu_`` and ``copy_`` do."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def is_view(node: fx.Node) -> bool:
    """Whether what an operator returns may share memory with what it reads."""
    if node.op == "output":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return True
    return not schema.is_mutable and any(out.alias_info is not None for out in schema.returns)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made a node; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    # A module called for the second time is entered as `path@1`.
    return str(paths[-1]).split("@")[0] if paths else ""
