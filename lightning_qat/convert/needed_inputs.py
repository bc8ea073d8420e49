"""Leave out of a captured graph what the wanted outputs do not need: outputs, inputs, labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec
from torch.utils import _pytree as pytree

from lightning_qat.model.torch_private import forget_guards
from lightning_qat.recipe.suggest import closest_names


@dataclass(frozen=True)
class Slot:
    """One tensor that a program returns.

    Args:
        index: Its place among the flattened outputs.
        path: The keys and numbers that lead to it, outermost first; empty: it is all there is.
    """

    index: int
    path: tuple[str, ...]


def output_slots(program: ExportedProgram) -> tuple[Slot, ...]:
    """Every tensor output of a program, in order."""
    out_spec: Any = program.call_spec.out_spec
    values: Any = program.graph.output_node().args[0]
    indices = pytree.tree_unflatten(list(range(out_spec.num_leaves)), out_spec)
    return tuple(
        Slot(index, tuple(map(_part, path)))
        for path, index in pytree.tree_flatten_with_path(indices)[0]
        if isinstance(values[index], fx.Node)
    )


def keep_outputs(program: ExportedProgram, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Keep the wanted outputs of a program and the inputs that they need, in place.

    In the place of what is left out ``None`` is returned, and ``None`` is an input.

    Args:
        program: The captured program.
        wanted: Names of outputs as ``QuantizedModel.output_names`` has them, or of what holds
            several (``boxes`` for ``boxes_0`` and ``boxes_1``). ``None``: all.

    Returns:
        Names of the tensor inputs that were left out.

    Raises:
        ValueError: An output of that name does not exist, or none is wanted.
    """
    if wanted is not None:
        _drop_outputs(program, wanted)
    program.graph.eliminate_dead_code()
    return _drop_inputs(program)


def needed_for_a_number(program: ExportedProgram) -> dict[int, tuple[str, ...]]:
    """Inputs that nothing needs but outputs of a single number, such as labels for a loss.

    Returns:
        For each such output, by its place among the tensor outputs, the names of those inputs.
        Empty where every output is such a number.
    """
    values: Any = program.graph.output_node().args[0]
    slots = output_slots(program)
    numbers = [slot for slot in slots if values[slot.index].meta["val"].dim() == 0]
    others = [values[slot.index] for slot in slots if slot not in numbers]
    if not others:
        return {}
    needed = {node.name for node in _ancestors(others)}
    inputs = {str(n) for n in program.graph_signature.user_inputs}
    found = {}
    for place, slot in enumerate(slots):
        if slot not in numbers:
            continue
        above = {node.name for node in _ancestors([values[slot.index]])} & inputs
        if above - needed:
            found[place] = tuple(sorted(above - needed))
    return found


def _part(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", ""))))


def _drop_outputs(program: ExportedProgram, wanted: Sequence[str]) -> None:
    slots = output_slots(program)
    beginnings = {
        slot: {"_".join(slot.path[:end]) for end in range(1, len(slot.path) + 1)} or {"output"}
        for slot in slots
    }
    for names in beginnings.values():
        # Numbers alone are no names: the file has output_0.
        names |= {f"output_{name}" for name in names if name[0].isdigit()}
    known = {name: None for names in beginnings.values() for name in sorted(names)}
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"export_outputs must name outputs of forward; got {name!r}, "
                f"{closest_names(name, known)}. It returns {[*known]}."
            )
    kept = {slot.index for slot, names in beginnings.items() if names & set(wanted)}
    if not kept:
        raise ValueError(f"export_outputs must name an output; got none of {[*known]}.")
    output = program.graph.output_node()
    returned: Any = output.args[0]
    values: list[Any] = list(returned)
    for slot in slots:
        if slot.index not in kept:
            values[slot.index] = None
            spec = program.graph_signature.output_specs[slot.index]
            spec.arg = ConstantArgument(name="", value=None)
    output.args = (tuple(values),)


def _drop_inputs(program: ExportedProgram) -> tuple[str, ...]:
    specs = program.graph_signature.input_specs
    specs_of_user: list[InputSpec] = [s for s in specs if s.kind is InputKind.USER_INPUT]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    flat, spec = pytree.tree_flatten(program.example_inputs or ((), {}))
    arguments = list(_argument_paths(program))
    dropped, paths = [], []
    for index, user in enumerate(specs_of_user):
        node = nodes.get(getattr(user.arg, "name", ""))
        if node is None or node.users or not isinstance(node.meta.get("val"), Tensor):
            continue
        user.arg = ConstantArgument(name=node.name, value=None)
        node.meta["val"] = None
        flat[index] = None
        dropped.append(node.name)
        paths.append(arguments[index])
    if dropped:
        program.example_inputs = pytree.tree_unflatten(flat, spec)
        forget_guards(program, paths)
    return tuple(dropped)


def _argument_paths(program: ExportedProgram) -> Iterable[str]:
    """How guards name every leaf of the inputs: ``L['batch']['labels']``."""
    signature: Any = program.module_call_graph[0].signature
    names = signature.forward_arg_names or []
    for path, _ in pytree.tree_flatten_with_path(program.example_inputs or ((), {}))[0]:
        keys: Any = path
        kind, first, *rest = keys
        in_args = kind.idx == 0
        name = names[first.idx] if in_args and first.idx < len(names) else _part(first)
        yield f"L['{name}']" + pytree.keystr(tuple(rest))


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found
