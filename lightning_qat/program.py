"""Read and change the constants of an exported program.

``torch.export`` lifts parameters and buffers to inputs of the graph and keeps their values beside
it; these functions keep the graph, its signature and the values in step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument


def constant_name(program: ExportedProgram, node: object) -> str | None:
    """The name under which a node's constant value is stored; ``None``: it is no constant."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    signature = program.graph_signature
    for names in (
        signature.inputs_to_parameters,
        signature.inputs_to_buffers,
        signature.inputs_to_lifted_tensor_constants,
    ):
        if node.name in names:
            return str(names[node.name])
    return None


def constant(program: ExportedProgram, node: object) -> Tensor | None:
    """The value of a constant node; ``None`` when the node is computed at run time."""
    name = constant_name(program, node)
    if name is None:
        return None
    value = program.state_dict.get(name, program.constants.get(name))
    return value.detach() if isinstance(value, Tensor) else None


def add_constant(program: ExportedProgram, name: str, value: Tensor) -> fx.Node:
    """Add a constant to a program.

    Args:
        program: Changed in place.
        name: Dotted name, not in use yet.
        value: Its value.

    Returns:
        The graph's node of the constant.

    Raises:
        ValueError: The name is in use.
    """
    if name in program.state_dict or name in program.constants:
        raise ValueError(f"The program already holds a constant named {name!r}.")
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    with program.graph.inserting_before(placeholders[0]):
        node: fx.Node = program.graph.placeholder("b_" + name.replace(".", "_"))
    fake_mode = next(
        n.meta["val"].fake_mode for n in placeholders if hasattr(n.meta.get("val"), "fake_mode")
    )
    node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    spec = InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True)
    program.graph_signature.input_specs.insert(0, spec)
    program.state_dict[name] = value
    return node


def settle(program: ExportedProgram) -> None:
    """After changes to the graph: remove what is dead, bring the signature in step, in place."""
    program.graph.eliminate_dead_code()
    outputs: Any = program.graph.output_node().args[0]
    for output, value in zip(program.graph_signature.output_specs, outputs, strict=True):
        if isinstance(value, fx.Node):
            output.arg = TensorArgument(value.name)
    unused = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and not node.users:
            name = constant_name(program, node)
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


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made a node; empty for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    # A module called for the second time is entered as `path@1`.
    return str(paths[-1]).split("@")[0] if paths else ""
