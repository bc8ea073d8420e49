"""Whether a captured program's dynamic batch is one: it runs, and computes, at other sizes too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

_SIZES = (2, 3)
"""Without a common factor, so that a batch which must be a multiple of some number shows."""


def has_dynamic_input(program: ExportedProgram) -> bool:
    """Whether any size of any input is dynamic."""
    return any(_is_dynamic(size) for shape in _input_shapes(program) for size in shape)


def takes_other_batches(program: ExportedProgram) -> bool:
    """Whether the dynamic sizes of a program are those of a batch.

    ``x.view(8, -1)`` and ``x.view(1, -1)`` leave a size dynamic that is none: what grows with the
    batch is another axis of the output, or other sizes than multiples of 8 are refused. Here every
    size of an output that grows must stand first (``4 * batch`` is rows of several per sample) or
    be the batch itself, and the program must run with two and with three samples.

    Args:
        program: Captured with the batch dynamic and nothing else.
    """
    outputs: Any = program.graph.output_node().args[0]
    for value in outputs:
        shape = getattr(value.meta.get("val"), "shape", ()) if isinstance(value, fx.Node) else ()
        for axis, size in enumerate(shape):
            if axis and _is_dynamic(size) and not size.node.expr.is_symbol:
                return False
    module = program.module()
    for size in _SIZES:
        args, kwargs = _resized(program, size)
        try:
            with torch.no_grad():
                module(*args, **kwargs)
        except (AssertionError, RuntimeError):
            return False
    return True


def _is_dynamic(size: Any) -> bool:
    # Loads sympy.
    from torch.fx.experimental.symbolic_shapes import free_symbols

    return bool(free_symbols(size))


def _resized(program: ExportedProgram, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example inputs with another batch: their samples, repeated or left out."""
    args, kwargs = program.example_inputs or ((), {})
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for index, (leaf, shape) in enumerate(zip(leaves, _input_shapes(program), strict=True)):
        for axis, size in enumerate(shape):
            if isinstance(leaf, Tensor) and _is_dynamic(size):
                leaf = leaf.index_select(axis, torch.arange(batch) % leaf.shape[axis])
        leaves[index] = leaf
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return args, kwargs


def _input_shapes(program: ExportedProgram) -> list[tuple[Any, ...]]:
    """The shape of every leaf of the inputs, in their order; empty where it is no tensor."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
    names = (getattr(spec.arg, "name", "") for spec in specs)
    found = (nodes[name].meta.get("val") if name in nodes else None for name in names)
    return [tuple(value.shape) if isinstance(value, Tensor) else () for value in found]


def settle_sizes(program: ExportedProgram) -> None:
    """Write the sizes that the forward fixed as plain integers, in place.

    ``len(x)`` in a forward makes torch.export fix the batch, and leaves a symbol there whose
    expression is a number.
    """
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor) and any(map(_is_settled, value.shape)):
            sizes, strides = (
                [int(n) if _is_settled(n) else n for n in numbers]
                for numbers in (value.shape, value.stride())
            )
            with value.fake_mode:
                node.meta["val"] = torch.empty_strided(
                    sizes, strides, dtype=value.dtype, device=value.device
                )


def _is_settled(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not _is_dynamic(size)
