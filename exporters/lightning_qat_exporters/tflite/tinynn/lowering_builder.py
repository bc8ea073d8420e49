"""The ``Builder`` of this backend: decompositions add integer operators to the new graph."""

from __future__ import annotations

from typing import Literal

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.tinynn.lowering import Lowering, Value
from lightning_qat_exporters.tflite.tinynn.ops import OPS


class LoweringBuilder:
    """Adds operators to the graph of a ``Lowering``."""

    def __init__(self, lowering: Lowering) -> None:
        self._lowering = lowering

    def constant(self, tensor: QuantizedTensor) -> Value:
        """Add a quantized constant."""
        return Value(self._lowering.integers(tensor), tensor.qparams)

    def binary(
        self,
        function: Literal["add", "mul"],
        x: Value,
        y: Value,
        output: QParams,
        activation: Literal["none", "relu6"] = "none",
    ) -> Value:
        """Add ADD or MUL."""
        operands = (x.node, y.node, function, activation)
        return self._lowering.emit(OPS.binary.default, *operands, qparams=output)

    def depthwise(
        self,
        x: Value,
        weight: QuantizedTensor,
        stride: list[int],
        padding: list[int],
        output: QParams,
    ) -> Value:
        """Add DEPTHWISE_CONV_2D without bias."""
        lowering, integers = self._lowering, weight.integers
        assert integers is not None
        constants = (
            lowering.attribute(integers),
            lowering.attribute(weight.qparams.scale),
            None,
        )
        options = (stride, padding, [1, 1], integers.shape[0], "none")
        return lowering.emit_layer(
            OPS.convolve.default, x.node, *constants, *options, qparams=output, key=weight.key
        )
