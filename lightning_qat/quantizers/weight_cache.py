"""Weights quantized once for several forwards: gradient accumulation, recomputation, evaluation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_qat.numerics.int_repr import IntRepr, int_repr_of


class QuantizedWeightCache:
    """Keeps quantized weights of earlier forwards, while it is open.

    A weight that was changed in place, or whose memory is another, is quantized anew. What torch
    cannot tell are changes through ``.data``, as some optimizers and averages make them: whoever
    opens this must ``forget`` where such may happen.
    """

    def __init__(self) -> None:
        self.open = False
        self._entries: dict[int, tuple[Any, Tensor | IntRepr]] = {}

    def forget(self) -> None:
        """Quantize every weight anew."""
        self._entries.clear()

    def get(self, owner: object, state: Any) -> Tensor | IntRepr | None:
        """The weight of an owner that was put in the same state, or ``None``."""
        found = self._entries.get(id(owner)) if self.open else None
        return found[1] if found is not None and found[0] == state else None

    def put(self, owner: object, state: Any, quantized: Tensor) -> None:
        """Keep a quantized weight: its integers where it carries any, else a view of its values."""
        if self.open:
            int_repr = int_repr_of(quantized)
            self._entries[id(owner)] = state, quantized.detach() if int_repr is None else int_repr


def tensor_state(*tensors: Tensor) -> Any:
    """A value that changes when the tensors do, as far as torch can tell.

    Rows of a packed parameter are another tensor at every call: what they are a view of is not.
    """
    return tuple((id(t if t._base is None else t._base), t.data_ptr(), t._version) for t in tensors)
