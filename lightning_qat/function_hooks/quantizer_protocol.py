"""The parts of a quantizer that the function hooks call."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class InputQuantizer(Protocol):
    """Quantizes operands of calls.

    Attributes:
        identity: Two quantizers are the same one if this object is.
    """

    identity: object

    @property
    def idle(self) -> bool:
        """Whether it returns its input now, and takes no note of it."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """Quantize a float tensor; shape and dtype stay."""
        ...

    def quantize_tied(self, values: list[Tensor]) -> list[Tensor]:
        """Quantize the inputs of a concatenation with one scale and zero point."""
        ...


class Observations(Protocol):
    """What the quantizers of one forward have observed, and not yet taken into their ranges."""

    def commit(self, remember: bool) -> None:
        """Take all of it into the ranges.

        Args:
            remember: Keep the ranges before, for ``as_in_forward``.
        """
        ...

    def as_in_forward(self) -> AbstractContextManager[None]:
        """Inside, every quantizer has the range again with which the forward has quantized."""
        ...


class FusableQuantizer(InputQuantizer, Protocol):
    """A quantizer that can also clamp its input in the same pass; see ``relu_fusion``."""

    def quantize_clamped(
        self, x: Tensor, ends: tuple[float, float]
    ) -> tuple[Tensor, Tensor | None] | None:
        """Clamp and quantize in one pass.

        Returns:
            The quantized tensor, and what to give to ``observe`` if it is read; ``None`` where
            clamp and quantization must stay two passes.
        """

    def observe(self, batch: Tensor) -> None:
        """Take note of the range of one batch: ``(-min, max)``, shape ``(2,)``."""
