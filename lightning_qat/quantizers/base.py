"""The base class of quantizers: float32 state, and a spec that travels with the state_dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from lightning_qat.quantizers.names import SPEC
from lightning_qat.quantizers.observation_gate import ObservationGate, is_training_forward
from lightning_qat.quantizers.stored_values import from_tensor, to_tensor

_Self = TypeVar("_Self", bound="Quantizer")


class Quantizer(nn.Module):
    """Base class of activation and weight quantizers.

    Half-precision plugins cast a model's tensors; a quantizer's stay float32. A float checkpoint
    has none of a quantizer's keys and loads as it is, which leaves the quantizer as it was; a
    checkpoint with some of them must have all.

    Attributes:
        gate: Says which forwards train the model; ``None``: the mode of the called module does.
        place: Its place in the model, for error messages; see ``names.place``.
    """

    SWITCHES: ClassVar[frozenset[str]] = frozenset({"gate"})
    """The attributes that turn a part of the quantizer on or off; see ``switches``."""

    gate: ObservationGate | None = None
    place: str = ""
    spec: Any

    def switches(self) -> dict[str, Any]:
        """The present value of each switch."""
        return {name: getattr(self, name) for name in self.SWITCHES}

    @property
    def in_training(self) -> bool:
        """Whether the forward that runs now trains the model; see ``is_training_forward``."""
        return is_training_forward(self.gate, self.training)

    def get_extra_state(self) -> Tensor:
        """The spec, so that a weights-only checkpoint can rebuild the quantizer; uint8."""
        return _stored(self.spec).clone()

    def set_extra_state(self, state: Tensor | Mapping[str, Any]) -> None:
        """Refuse the state of another spec: its range would mean something else.

        Raises:
            RuntimeError: The checkpoint's spec differs; every differing key is named.
            ValueError: The checkpoint's spec was changed.
        """
        # JSON spells tuples as lists.
        values = from_tensor(state, SPEC)
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        own = asdict(self.spec)
        keys = sorted(set(own) | set(stored))
        different = [
            f"{key}: checkpoint {stored.get(key)!r}, model {own.get(key)!r}"
            for key in keys
            if stored.get(key) != own.get(key)
        ]
        if different:
            raise RuntimeError(
                f"The checkpoint's {type(self.spec).__name__} differs from the model's: "
                + "; ".join(different)
                + ". Use the recipe the checkpoint was trained with."
            )

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        kept = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        learned = {name: p.detach() for name, p in self._parameters.items() if p is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and before.is_floating_point() and after.dtype != before.dtype:
                # Take the new device, not the new dtype; the old values, not rounded ones.
                self._buffers[name] = before.to(after.device)
        for name, before in learned.items():
            parameter = self._parameters[name]
            if parameter is not None and parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return
        try:
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )
        except (RuntimeError, ValueError) as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")


@lru_cache
def _stored(spec: Any) -> Tensor:
    return to_tensor(asdict(spec))
