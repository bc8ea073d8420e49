"""Where the quantizers of a module's calls are: with the module, but not among its children.

A user's code meets its own children only: ``for layer in self``, ``len``, slices and ``children()``
are as they were. Everything that goes through all parts of a model goes through the quantizers too,
under the names that a child ``qat_joins`` would have: ``named_modules`` and so ``parameters``,
``to``, ``train``, ``state_dict`` and ``load_state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_qat.model.attributes import JOINS_LOADER
from lightning_qat.quantizers.names import JOINS


def held_by(owner: nn.Module) -> nn.ModuleDict | None:
    """The quantizers of the calls of a module, by name; ``None``: it has none."""
    found: nn.ModuleDict | None = owner.__dict__.get(JOINS)
    return found


def hold_joins(owner: nn.Module) -> nn.ModuleDict:
    """The quantizers of the calls of a module, which may be none yet.

    Args:
        owner: The module; its attribute ``qat_joins`` holds them.
    """
    found = held_by(owner)
    if found is None:
        found = owner.__dict__[JOINS] = nn.ModuleDict().train(owner.training)
        for name, function in _THROUGH_ALL_PARTS.items():
            owner.__dict__[name] = partial(function, owner)
        if JOINS_LOADER not in owner.__dict__:
            load_held_last(owner)
    return found


def load_held_last(owner: nn.Module) -> None:
    """Have ``load_state_dict`` load the quantizers of a module, after all other hooks of today.

    They may be none yet: a hook that puts them into the module cannot add another hook.
    """
    earlier = owner.__dict__.pop(JOINS_LOADER, None)
    if earlier is not None:
        earlier.remove()
    register: Any = owner.register_load_state_dict_pre_hook
    owner.__dict__[JOINS_LOADER] = register(_load)


def _named_modules(
    owner: nn.Module,
    memo: set[nn.Module] | None = None,
    prefix: str = "",
    remove_duplicate: bool = True,
) -> Iterator[tuple[str, nn.Module]]:
    memo = set() if memo is None else memo
    known = owner in memo
    yield from type(owner).named_modules(owner, memo, prefix, remove_duplicate)
    held = held_by(owner)
    if held is not None and not known:
        yield from held.named_modules(memo, f"{prefix}.{JOINS}".lstrip("."), remove_duplicate)


def _apply(owner: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    of_class: Any = type(owner)._apply
    of_class(owner, fn, recurse)
    held: Any = held_by(owner)
    if recurse and held is not None:
        held._apply(fn)
    return owner


def _train(owner: nn.Module, mode: bool = True) -> nn.Module:
    type(owner).train(owner, mode)
    held = held_by(owner)
    if held is not None:
        held.train(mode)
    return owner


def _save(owner: nn.Module, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    of_class: Any = type(owner)._save_to_state_dict
    of_class(owner, destination, prefix, keep_vars)
    held = held_by(owner)
    if held is not None:
        held.state_dict(destination=destination, prefix=f"{prefix}{JOINS}.", keep_vars=keep_vars)


_THROUGH_ALL_PARTS: Mapping[str, Callable[..., Any]] = {
    "named_modules": _named_modules,
    "_apply": _apply,
    "train": _train,
    "_save_to_state_dict": _save,
}
"""What torch calls of every module of a model, by the attribute of the object."""


def _load(
    owner: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    held = held_by(owner)
    if held is None:
        return
    start = f"{prefix}{JOINS}."
    # torch would look for a child of this name.
    own = {key: state_dict.pop(key) for key in list(state_dict) if key.startswith(start)}
    # How to load, not what was saved.
    how = {key: metadata[key] for key in ("assign_to_params_buffers",) if key in metadata}
    for name, quantizer in held.items():
        path = f"{start}{name}."
        of_one = {key: own.pop(key) for key in list(own) if key.startswith(path)}
        quantizer._load_from_state_dict(
            of_one, path, how, strict, missing_keys, unexpected_keys, error_msgs
        )
    unexpected_keys.extend(own)
