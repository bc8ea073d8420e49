"""What a backend offers to a decomposition: integer operators with the qparams of their output."""

from __future__ import annotations

from typing import Literal, Protocol, TypeVar

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import QParams

V = TypeVar("V")
"""A backend's own handle of a value in its graph."""


class Builder(Protocol[V]):
    """Adds operators to a backend's graph."""

    def constant(self, tensor: QuantizedTensor) -> V:
        """Add a quantized constant."""
        ...

    def binary(
        self,
        function: Literal["add", "mul"],
        x: V,
        y: V,
        output: QParams,
        activation: Literal["none", "relu6"] = "none",
    ) -> V:
        """Add ADD or MUL with a fused activation; the result is quantized to ``output``."""
        ...

    def depthwise(
        self, x: V, weight: QuantizedTensor, stride: list[int], padding: list[int], output: QParams
    ) -> V:
        """Add a depthwise convolution without bias; the result is quantized to ``output``."""
        ...
