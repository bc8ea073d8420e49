"""The sizes that inputs of an exported program have: fixed numbers, and names of dynamic ones."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from torch.export import ExportedProgram

Size = int | str
"""A fixed size, or the name of a dynamic one: ``batch``, ``x_2``, or ``2*batch``."""


def input_shapes(program: ExportedProgram) -> Mapping[str, tuple[Size, ...]]:
    """The shape of every tensor input by the name of its node, in order.

    The dynamic size that stands first of an input is ``batch`` (or second, as a recurrent layer
    may have it), and so is that of other inputs which is as large in the example: torch.export has
    several names for one batch where the model does not need its inputs to agree. Another is called
    by the input and the axis where it stands first: ``x_2``.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values = {
        str(name): nodes[name].meta["val"].shape
        for name in program.graph_signature.user_inputs
        if name in nodes and isinstance(nodes[name].meta.get("val"), Tensor)
    }
    symbols: dict[str, str] = {}
    for axis in (0, 1):
        sizes = [shape[axis] for shape in values.values() if len(shape) > axis]
        dynamic = [size for size in sizes if not isinstance(size, int)]
        if dynamic and not symbols:
            symbols.update({name: "batch" for name in _symbols_of(dynamic[0])[:1]})
            like = [size for size in dynamic if size.node.hint == dynamic[0].node.hint]
            symbols.update({str(size): "batch" for size in like if len(_symbols_of(size)) == 1})
    for name, shape in values.items():
        for axis, size in enumerate(shape):
            for symbol in _symbols_of(size):
                symbols.setdefault(symbol, f"{name}_{axis}")
    return {
        name: tuple(size if isinstance(size, int) else _named(size, symbols) for size in shape)
        for name, shape in values.items()
    }


def _symbols_of(size: object) -> list[str]:
    return [] if isinstance(size, int) else re.findall(r"[a-zA-Z_]\w*", str(size))


def _named(size: object, symbols: Mapping[str, str]) -> str:
    return re.sub(r"[a-zA-Z_]\w*", lambda found: symbols.get(found[0], found[0]), str(size))
