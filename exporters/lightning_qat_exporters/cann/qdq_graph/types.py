"""What is found in a QDQ graph: quantized activations, integer layers, integer LSTM and GRU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat.export.protocol import Array, CannotExpress, Unsupported

DstType = Literal["INT8", "INT16"]
WtsType = Literal["INT8", "INT4"]

TARGET = "cann"
"""The exporter's name, for errors."""

DEVICE_REMEDY = "CannExporter(rnn='device') writes the device's own node for it"

REAL_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class UnusableValues(CannotExpress):
    """The structure of a quantized layer is right, but its values have no integer form."""


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """One tensor with one scale and offset: all Q/DQ pairs of the model that quantize it so.

    ``real = scale_d * (integer - offset_d)`` with signed integers; unsigned ones are shifted.

    Attributes:
        name: The first layer that reads the integers; else the first reader or the graph output.
        source: The real tensor.
        scale_d: The scale.
        offset_d: The zero point.
        dst_type: Type of the integers.
        low: Smallest integer in use; above the type's own where a Clip narrows the range.
        high: Largest integer in use.
        real: Type of the real tensor, float32 or float16.
        quantizes: The QuantizeLinear nodes, in graph order.
        dequantizes: The DequantizeLinear nodes, in graph order.
    """

    name: str
    source: ir.Value
    scale_d: np.float32
    offset_d: int
    dst_type: DstType
    low: int
    high: int
    real: ir.DataType
    quantizes: tuple[ir.Node, ...]
    dequantizes: tuple[ir.Node, ...]

    @property
    def narrowed(self) -> bool:
        """Whether a Clip keeps the integers inside a part of their type's range."""
        return (self.low, self.high) != type_range(self.dst_type)


@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """One convolution or matrix product that runs on integers.

    Attributes:
        name: The layer's name, unique in the model.
        node: The compute node; its input 0 is a DequantizeLinear of ``activation``, maybe cast.
        activation: The layer's quantized input.
        weight: Integers: Conv ``[Cout, Cin/g, k...]``, ConvTranspose ``[Cin, Cout/g, k...]``,
            Gemm and MatMul ``[in, out]`` whatever ``transB`` says.
        scale_w: The weight's scale, of length 1 or Cout.
        channel_axis: Axis of the output channels in ``weight``.
        bias: Real bias of length Cout, or None. Float64 where the model stores scaled integers.
        add: The Add that brings the bias of a MatMul; None where ``node`` reads the bias itself.
        real: Type of the layer's output, float32 or float16.
        wts_type: ``INT4`` where the model stores the weight as such and two fit into a byte.
    """

    name: str
    node: ir.Node
    activation: QuantizedActivation
    weight: NDArray[np.int8]
    scale_w: NDArray[np.float32]
    channel_axis: int
    bias: Array | None
    add: ir.Node | None
    real: ir.DataType
    wts_type: WtsType

    @property
    def accumulator_scale(self) -> NDArray[np.float32]:
        """The accumulator's scale: ``scale_d * scale_w``, in float32."""
        return self.activation.scale_d * self.scale_w

    @property
    def bias_steps(self) -> NDArray[np.float64] | None:
        """The bias in steps of the accumulator, not rounded; None where the node reads none.

        The division is in float64, as AMCT's.
        """
        if self.bias is None or self.add is not None:
            return None
        with np.errstate(divide="ignore", invalid="ignore"):
            return self.bias.astype(np.float64) / self.accumulator_scale.astype(np.float64)


@dataclass(frozen=True, eq=False)
class IntegerRecurrent:
    """An LSTM or GRU on integers; rows are gates in ONNX's order times hidden features.

    Attributes:
        name: The layer's name.
        node: The ``LSTM`` or ``GRU``.
        x: Its quantized input.
        h: Its quantized initial hidden state, whose scale later hidden states have, too.
        weight: Integers ``[1, gates * hidden, features]``.
        recurrent: Integers ``[1, gates * hidden, hidden]``.
        scale_w: Scale of ``weight``, per row or per gate.
        scale_r: Scale of ``recurrent``, per row or per gate.
        bias: Integers ``[1, 2 * gates * hidden]``, or None.
        steps: Length of the sequence, where the model fixes it.
        wts_type: ``INT4`` where the model stores both weights as such and two fit into a byte.
    """

    name: str
    node: ir.Node
    x: QuantizedActivation
    h: QuantizedActivation
    weight: NDArray[np.int8]
    recurrent: NDArray[np.int8]
    scale_w: NDArray[np.float32]
    scale_r: NDArray[np.float32]
    bias: NDArray[np.int32] | None
    steps: int | None
    wts_type: WtsType = "INT8"

    @property
    def accumulator_scale(self) -> NDArray[np.float32]:
        """``scale_d * scale_w`` and behind it ``scale_h * scale_r``, in float32."""
        return np.concatenate((self.x.scale_d * self.scale_w, self.h.scale_d * self.scale_r))


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """What a QDQ model quantizes.

    Attributes:
        model: The model; nodes and values below are its own.
        activations: Every quantized tensor, in graph order; read by layers or by real operators.
        layers: Every layer that computes with integers, in graph order.
        recurrent: Every LSTM and GRU that has a device node, if they were asked for.
        left_float: Compute nodes that keep real values, and why.
        problems: Quantization that has no integer form at all, and why.
    """

    model: ir.Model
    activations: tuple[QuantizedActivation, ...]
    layers: tuple[IntegerLayer, ...]
    recurrent: tuple[IntegerRecurrent, ...]
    left_float: tuple[Unsupported, ...]
    problems: tuple[Unsupported, ...]

    def copied(self) -> QuantizedGraph:
        """The same for a copy of the model, which may be rewritten; tensors are shared."""
        copy = self.model.clone()
        old, new = self.model.graph, copy.graph
        nodes = dict(zip(old, new, strict=True))
        values = dict(zip(old.inputs, new.inputs, strict=True))
        for before, after in nodes.items():
            values.update(zip(before.outputs, after.outputs, strict=True))
        moved = {
            activation: replace(
                activation,
                source=values[activation.source],
                quantizes=tuple(nodes[n] for n in activation.quantizes),
                dequantizes=tuple(nodes[n] for n in activation.dequantizes),
            )
            for activation in self.activations
        }
        layers = (
            replace(
                layer,
                node=nodes[layer.node],
                activation=moved[layer.activation],
                add=None if layer.add is None else nodes[layer.add],
            )
            for layer in self.layers
        )
        recurrent = (
            replace(layer, node=nodes[layer.node], x=moved[layer.x], h=moved[layer.h])
            for layer in self.recurrent
        )
        return replace(
            self,
            model=copy,
            activations=tuple(moved.values()),
            layers=tuple(layers),
            recurrent=tuple(recurrent),
        )


def type_range(dst_type: DstType) -> tuple[int, int]:
    """Smallest and largest integer of an activation's type.

    >>> type_range("INT8")
    (-128, 127)
    """
    limits = np.iinfo(np.int8 if dst_type == "INT8" else np.int16)
    return int(limits.min), int(limits.max)
