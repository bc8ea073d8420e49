"""What a recorded call does to values: it makes new ones, keeps them, or computes a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.layers import QATLayer
from lightning_qat.layers.table import WITH_WEIGHTS

_ACCOUNTED_ELSEWHERE = (*WITH_WEIGHTS, QATLayer, nn.modules.batchnorm._BatchNorm)
"""Layers whose arithmetic the report names, or that batch norm folding removes."""
_NO_VALUES = frozenset(
    "to float double half bfloat16 type type_as cpu cuda requires_grad_ __get__ __set__ "
    "__setitem__ zeros_like ones_like empty_like full_like rand_like randn_like bernoulli "
    "new_zeros new_ones new_full new_empty new_tensor".split()
)
"""Functions that compute no new values from those of a tensor."""


def computes_values(
    module: nn.Module,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    results: Sequence[Tensor],
) -> bool:
    """Whether a call of a function that is not in the table makes new values of a tensor.

    Args:
        module: Whose forward makes the call.
        func: The function.
        args: Its arguments by position.
        kwargs: Its arguments by keyword.
        results: The tensors that it returned.
    """
    name = getattr(func, "__name__", "")
    if isinstance(module, _ACCOUNTED_ELSEWHERE) or name in _NO_VALUES:
        return False
    leaves = pytree.tree_leaves((args, kwargs))
    given = [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.dim()]
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(given) and any(
        t.is_floating_point() and t.dim() and (in_place or all(t is not x for x in given))
        for t in results
    )


class WeightTensors:
    """The tensors of one forward that depend on parameters alone: exact until a product."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._keys: set[Key] = set()
        for module in modules:
            self._keys |= {key_of(p) for p in module._parameters.values() if p is not None}

    def __contains__(self, key: Key) -> bool:
        return key in self._keys

    def follow(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        results: Iterable[Key],
        is_fixed: Callable[[Tensor], bool],
    ) -> bool:
        """Whether a call has weights alone as its tensors; then its results are weights, too.

        Buffers and other fixed tensors may be beside the weights.
        """
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        weights = [key_of(x) in self._keys for x in given]
        if not any(weights) or not all(
            weight or is_fixed(x) for x, weight in zip(given, weights, strict=True)
        ):
            return False
        self._keys.update(results)
        return True
