"""Quantize every tensor of a captured graph once per key."""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from lightning_qat.ir.ops import as_fake_quantize


def merge_quantizations(program: ExportedProgram) -> None:
    """Remove a quantization that repeats another one with the same key, in place.

    The other one quantizes the same tensor, or made the tensor that is quantized again. Both arise
    where dropout stood between two consumers.
    """
    first: dict[tuple[fx.Node, str], fx.Node] = {}
    for node in list(program.graph.nodes):
        call = as_fake_quantize(node)
        if call is None:
            continue
        before = as_fake_quantize(call.x)
        same = call.x if before is not None and before.key == call.key else None
        same = same or first.setdefault((call.x, call.key), node)
        if same is not node:
            node.replace_all_uses_with(same)
            program.graph.erase_node(node)
