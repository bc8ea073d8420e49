"""Name the axes that ``squeeze`` removes, which a file for one sample must know from the batch."""

from __future__ import annotations

import torch
from torch import fx


def name_squeezed_axes(graph: fx.Graph) -> None:
    """Replace every ``squeeze()`` by one with its axes, in place.

    Without axes it removes all of size 1: of a file's single sample the batch too, which is dynamic
    in the program and so no axis that it removes.
    """
    for node in graph.nodes:
        if node.target is torch.ops.aten.squeeze.default:
            sizes = node.args[0].meta["val"].shape
            axes = [axis for axis, size in enumerate(sizes) if isinstance(size, int) and size == 1]
            node.target, node.args = torch.ops.aten.squeeze.dims, (node.args[0], axes)
