"""What a recorded call does to values: makes new ones, keeps them, computes a weight, convolves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.function_hooks.forward_cache import Key, key_of
from lightning_qat.joins.calls import Call
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


class _ConvOutput(NamedTuple):
    """What a convolution gives, or the batch norm behind it.

    Args:
        depth: Layers on the longest way to it.
        number: Of the convolution's call, in the order of the forward.
        conv: Module of the convolution.
    """

    depth: int
    number: int
    conv: str


class ConvOutputs:
    """Follows through one forward which tensors convolutions give, and behind how many layers."""

    def __init__(self) -> None:
        self._outputs: dict[Key, _ConvOutput] = {}
        # By identity: a tensor that is changed in place stays behind as many layers.
        self._depths: dict[int, int] = {}
        self._entered: dict[str, int] = {}
        self._calls = 0

    def enter(self, layer: str, x: Tensor) -> None:
        """Note what a layer is given; its convolution reads that quantized."""
        self._entered[layer] = self._depths.get(id(x), 0)

    def follow(self, call: Call) -> None:
        """Note what a call makes."""
        self._calls += 1
        name, given = call.function, call.float_operands
        depth = max((self._depths.get(id(x), 0) for x in given), default=0)
        if name.startswith("conv") or name == "linear":
            depth = max(depth, self._entered.get(call.module, 0)) + 1
        self._depths.update({id(x): depth for x in call.leaves})
        source = None
        if name.startswith("conv"):
            source = _ConvOutput(depth, self._calls, call.module)
        elif name in ("batch_norm", "dropout") and given:
            source = self._outputs.get(key_of(given[0]))
        if source is not None:
            self._outputs.update(dict.fromkeys(call.outs, source))

    def fusing(self, call: Call) -> Mapping[int, str]:
        """The operand of a sum that a convolution adds inside its kernel, and the convolution.

        Of two convolutions it is the one with more layers before it; the other is the shortcut. Of
        two with as many it is the one that runs later.
        """
        if call.function != "add" or call.kwargs.get("alpha", 1) != 1 or len(call.keys) != 2:
            return {}
        if call.keys[0] == call.keys[1] or call.tensors[0].shape != call.tensors[1].shape:
            return {}
        found = {i: self._outputs[key] for i, key in enumerate(call.keys) if key in self._outputs}
        if not found:
            return {}
        number = max(found, key=lambda i: found[i])
        return {number: found[number].conv}
