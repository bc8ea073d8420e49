"""Example inputs in the form of a call, and the device they belong on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.model.containers import is_opaque


class Call(NamedTuple):
    """The arguments of a call that has both kinds.

    Args:
        args: Positional arguments.
        kwargs: Keyword arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What ``forward`` takes: a tensor, positional arguments, or keyword arguments by name; a ``Call``
has both."""


def as_call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call, every tensor detached and on the CPU.

    Raises:
        ValueError: There is no tensor among them.
    """
    if isinstance(inputs, Call):
        call: tuple[tuple[Any, ...], dict[str, Any]] = inputs.args, dict(inputs.kwargs)
    elif isinstance(inputs, Mapping):
        call = (), dict(inputs)
    else:
        call = (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}
    for leaf in pytree.tree_leaves(call):
        if is_opaque(leaf):
            kind = type(leaf).__name__
            raise ValueError(
                f"forward takes a {kind}, a dataclass, into which torch does not look. Call "
                f"torch.export.register_dataclass({kind}) once, before training and wherever the "
                "converted model is loaded, or let forward take tensors."
            )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(call)):
        raise ValueError(
            "Inputs must hold at least one tensor: a tensor, a tuple of positional arguments or a "
            f"mapping of keyword arguments; got {type(inputs).__name__}."
        )
    return pytree.tree_map_only(  # type: ignore[no-any-return]
        Tensor, lambda tensor: tensor.detach().cpu(), call
    )


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def first_samples(inputs: Any, count: int) -> Any:
    """Inputs with at most so many samples.

    Tensors whose first dimension is that of the first tensor share its batch and are cut; others
    are kept whole.
    """
    batch = batch_of(inputs)

    def cut(leaf: Tensor) -> Tensor:
        return leaf[:count] if leaf.dim() > 0 and leaf.shape[0] == batch else leaf

    return pytree.tree_map_only(Tensor, cut, inputs)


def batch_of(inputs: Any) -> int:
    """The size of the first dimension of the first tensor; 0: there is none."""
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    return tensors[0].shape[0] if tensors else 0


def as_float32(inputs: Any) -> Any:
    """The inputs as the exported forward takes them: floating tensors in float32."""

    def cast(leaf: Tensor) -> Tensor:
        return leaf.float() if leaf.is_floating_point() else leaf

    return pytree.tree_map_only(Tensor, cast, inputs)
