"""Notice that an evaluation has changed the model that it measures."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from lightning_qat.quantizers.base import Quantizer
from lightning_qat.quantizers.weight_cache import tensor_state


class Unchanged:
    """Remembers the weights and buffers of a model, but for those of quantizers.

    Bytes are compared only where torch says that a tensor may have changed, and after the first
    evaluation, since what is written through ``.data`` is seen by its bytes alone.

    Args:
        model: The model, as it has to stay.
    """

    def __init__(self, model: nn.Module) -> None:
        self._bytes = {name: digest(tensor) for name, tensor in _own_tensors(model).items()}
        self._states: dict[str, Any] = {}

    def check(self, model: nn.Module) -> None:
        """Compare.

        Raises:
            ValueError: Tensors have changed; they are named.
        """
        changed = []
        tensors = _own_tensors(model)
        for name, before in self._bytes.items():
            if name not in tensors:
                changed.append(name)
                continue
            state = tensor_state(tensors[name])
            if self._states.get(name) != state:
                self._states[name] = state
                if digest(tensors[name]) != before:
                    changed.append(name)
        if changed:
            shown = ", ".join(map(repr, changed[:5])) + (", ..." if len(changed) > 5 else "")
            raise ValueError(
                f"evaluate must leave the model as it is; it changed {shown}. Evaluate in eval "
                "mode (batch norm counts batches in training mode) and step no optimizer."
            )


def digest(tensor: Tensor) -> str:
    """A digest of a tensor's dtype, shape and values."""
    found = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()


def digest_of(model: nn.Module) -> str:
    """A digest of all weights and buffers of a model and their names."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in _tensors(model).items():
        found.update(f"{name} {digest(tensor)}\n".encode())
    return found.hexdigest()


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    quantizers = {name for name, m in model.named_modules() if isinstance(m, Quantizer)}
    named = _tensors(model).items()
    return {name: x for name, x in named if name.rpartition(".")[0] not in quantizers}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in named if not _is_lazy(tensor)}


def _is_lazy(tensor: Tensor) -> bool:
    return isinstance(tensor, UninitializedParameter | UninitializedBuffer)
