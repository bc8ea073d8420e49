"""Turn operators that write into their tensor into those that return a new one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lightning_qat.ir.exported_program import is_view, writes_in_place


def make_functional(graph: fx.Graph) -> None:
    """Turn ``relu_`` into ``relu``, and the like, in place.

    Exporters then need not trace the whole program anew to do so. Left as it is: a write into an
    input or a constant, and into a tensor that other nodes are views of.
    """
    for node in list(graph.nodes):
        if not writes_in_place(node) or not node.args:
            continue
        functional, written = _functional(node), node.args[0]
        if functional is None or not isinstance(written, fx.Node):
            continue
        if _has_other_names(written) or not _is_like(written, node):
            continue
        node.target = functional
        later = {user for user in written.users if node < user}
        written.replace_all_uses_with(node, delete_user_cb=later.__contains__)


def _functional(node: fx.Node) -> Any:
    """The overload ``relu.default`` of ``relu_.default``; ``None`` where there is none."""
    target: Any = node.target
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or any(a.is_out for a in target._schema.arguments):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    return getattr(packet, target._overloadname, None)


def _is_like(written: fx.Node, node: fx.Node) -> bool:
    """Whether all that an in-place operator reads has the type of what it writes.

    It keeps that type whatever it reads; its twin that returns a new tensor would not.
    """
    dtype = written.meta["val"].dtype
    tensors = (n.meta.get("val") for n in node.all_input_nodes)
    return all(v.dtype == dtype for v in tensors if isinstance(v, Tensor))


def _has_other_names(node: fx.Node) -> bool:
    """Whether a tensor's memory may be reached in another way than by its node."""
    return node.op == "placeholder" or any(is_view(n) for n in (node, *node.users))
