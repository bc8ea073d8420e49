"""How many bytes a graph keeps for its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def bytes_for_backward(result: Tensor, besides: list[Tensor]) -> int:
    """The bytes of all storages that the graph behind a tensor keeps, each counted once.

    Args:
        result: What ``backward`` would be called on.
        besides: Tensors that live anyway, such as the parameters: their storages do not count.
    """
    alive = {tensor.untyped_storage().data_ptr() for tensor in besides}
    sizes: dict[int, int] = {}
    # Addresses are only unique among living storages.
    held: list[object] = []
    visited: set[object] = set()
    waiting: list[Any] = [result.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        waiting += [following for following, _ in node.next_functions]
        for tensor in _saved(node):
            storage = tensor.untyped_storage()
            held.append(storage)
            if storage.data_ptr() not in alive:
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _saved(node: Any) -> list[Tensor]:
    saved = [getattr(node, name) for name in dir(node) if name.startswith("_raw_saved_")]
    raw = [getattr(one, "data", None) for one in pytree.tree_leaves(saved)]
    tensors = [*pytree.tree_leaves(raw), *getattr(node, "saved_tensors", ())]
    # What our hooks keep of a tensor on a grid.
    tensors = [getattr(tensor, "integers", tensor) for tensor in tensors]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]
