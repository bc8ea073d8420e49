"""Remember what a model's forward is given in training, for the export that comes later."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_qat.model.forward import is_real_forward

MOST_SAMPLES = 32
"""Enough for an agreement to mean something, little enough to keep on the CPU."""


class InputRecorder:
    """Records the inputs of the first real ``forward`` in training mode, then lets go.

    Attributes:
        inputs: Positional arguments as a tuple, or all arguments by keyword where some were given
            so; on the CPU, with at most ``MOST_SAMPLES`` samples. ``None`` until something ran.
    """

    def __init__(self) -> None:
        self.inputs: Any = None
        self._hook: Any = None

    @property
    def recording(self) -> bool:
        """Whether it listens to a model."""
        return self._hook is not None

    def start(self, model: nn.Module) -> None:
        """Listen to ``model``; a former recording is forgotten."""
        self.stop()
        self.inputs = None
        self._hook = model.register_forward_pre_hook(self._record, with_kwargs=True)

    def stop(self) -> None:
        """Stop listening; what was recorded stays."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.inputs is not None or not is_real_forward(model) or not model.training:
            return
        call: Any = args
        if kwargs:
            call = dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
        self.inputs = first_samples(call)


def first_samples(inputs: Any, most: int = MOST_SAMPLES) -> Any:
    """A copy on the CPU with at most ``most`` samples.

    Args:
        inputs: Any nesting; tensors whose first dimension is that of the first tensor share its
            batch and are cut, others are kept whole.
        most: How many samples.
    """
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()]
    batch = tensors[0].shape[0] if tensors else 0

    def keep(leaf: Tensor) -> Tensor:
        shared = leaf.dim() > 0 and leaf.shape[0] == batch
        return (leaf[:most] if shared else leaf).detach().cpu().clone()

    return pytree.tree_map_only(Tensor, keep, inputs)
