"""What is found in a QDQ graph: activations, quantized layers, remarks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat_exporters.cann.qdq_graph.names import label, unique

Array = NDArray[Any]
DstType = Literal["INT8", "INT16"]
WtsType = Literal["INT8", "INT4"]

COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that run on integers; every other operator keeps real values."""

RECURRENT_OPS = ("LSTM", "GRU")
"""Those that a device may have one integer operator for."""

DEVICE_REMEDY = "CannExporter(rnn='device') writes the device's own node for it"

INT8 = np.iinfo(np.int8)
_INT4 = ir.DataType.INT4.numpy()
VALUE_PRESERVING = ("Transpose", "Identity", "Cast")
REAL = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# A grid of unsigned integers is the signed grid shifted by half its size.
GRIDS: dict[np.dtype[Any], tuple[DstType, int]] = {
    np.dtype(np.int8): ("INT8", 0),
    np.dtype(np.uint8): ("INT8", 128),
    np.dtype(np.int16): ("INT16", 0),
    np.dtype(np.uint16): ("INT16", 32768),
}


@dataclass(frozen=True, eq=False)
class Activation:
    """One tensor on one integer grid: every Q/DQ pair of the model that puts it there.

    ``real = scale_d * (integer - offset_d)`` with signed integers; an unsigned grid is shifted.

    Attributes:
        name: The first layer that reads the integers; else the first reader or the graph output.
        source: The real tensor.
        scale_d: Real size of one step.
        offset_d: The integer that stands for real zero.
        dst_type: Type of the integers.
        low: Smallest integer in use; above the type's own where a Clip narrows the grid.
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
class QuantizedLayer:
    """One convolution or matrix product on integers.

    Attributes:
        name: The layer's name, unique in the model.
        node: The compute node; its input 0 is a DequantizeLinear of ``activation``, maybe cast.
        activation: The grid of the layer's input.
        weight: Integers: Conv ``[Cout, Cin/g, k...]``, ConvTranspose ``[Cin, Cout/g, k...]``,
            Gemm and MatMul ``[in, out]`` whatever ``transB`` says.
        scale_w: Real size of one step of the weight, of length 1 or Cout.
        channel_axis: Axis of the output channels in ``weight``.
        bias: Real bias of length Cout, or None. Float64 where the model stores scaled integers.
        add: The Add that brings the bias of a MatMul; None where ``node`` reads the bias itself.
        real: Type of the layer's output, float32 or float16.
        wts_type: ``INT4`` where the model stores the weight as such and two fit into a byte.
    """

    name: str
    node: ir.Node
    activation: Activation
    weight: NDArray[np.int8]
    scale_w: NDArray[np.float32]
    channel_axis: int
    bias: Array | None
    add: ir.Node | None
    real: ir.DataType
    wts_type: WtsType

    @property
    def source(self) -> ir.Value:
        """The real tensor that the layer reads quantized."""
        return self.activation.source

    @property
    def scale_d(self) -> np.float32:
        """Real size of one step of the layer's input."""
        return self.activation.scale_d

    @property
    def offset_d(self) -> int:
        """The integer that stands for real zero in the layer's input."""
        return self.activation.offset_d

    @property
    def dst_type(self) -> DstType:
        """Type of the layer's integer input."""
        return self.activation.dst_type

    @property
    def product_scale(self) -> NDArray[np.float32]:
        """Real size of one step of the accumulator: ``scale_d * scale_w``, in float32."""
        return self.scale_d * self.scale_w


@dataclass(frozen=True)
class Remark:
    """Something about one node of the model.

    Attributes:
        name: The layer or node.
        reason: What must hold and what we got.
        remedy: What to do about it; empty where nothing needs to be done.
    """

    name: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.name!r}: {self.reason}." + (f" {self.remedy}." if self.remedy else "")


class NotExpressible(ValueError):
    """The model has parts that the asked form cannot hold; all of them are named.

    Attributes:
        problems: Each part's name, the reason, and what to do.
    """

    def __init__(self, problems: Sequence[Remark]) -> None:
        """List every problem in the message."""
        self.problems = tuple(problems)
        super().__init__(" ".join(map(str, self.problems)))


@dataclass(frozen=True, eq=False)
class QuantizedGraph:
    """What a QDQ model quantizes.

    Attributes:
        activations: Every quantized tensor, in graph order; read by layers or by real operators.
        layers: Every layer that computes with integers, in graph order.
        left_float: Compute nodes that keep real values, and why.
        problems: Quantization that has no integer form at all, and why.
    """

    activations: tuple[Activation, ...]
    layers: tuple[QuantizedLayer, ...]
    left_float: tuple[Remark, ...]
    problems: tuple[Remark, ...]


def type_range(dst_type: DstType) -> tuple[int, int]:
    """Smallest and largest integer of an activation's type.

    >>> type_range("INT8")
    (-128, 127)
    """
    limits = np.iinfo(np.int8 if dst_type == "INT8" else np.int16)
    return int(limits.min), int(limits.max)


class Mismatch(Exception):
    """The structure is another one; the arguments are the reason and, maybe, a remedy."""


class Unfit(Exception):
    """The structure is right and its numbers cannot be expressed; arguments as above."""


@dataclass(eq=False)
class GridOf:
    """An ``Activation`` while its pairs and readers are being collected."""

    source: ir.Value
    scale: np.float32
    offset: int
    dst_type: DstType
    low: int
    high: int
    real: ir.DataType
    quantizes: list[ir.Node] = field(default_factory=list)
    dequantizes: list[ir.Node] = field(default_factory=list)
    reader: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            *(id(self.source), self.scale.tobytes(), self.offset),
            *(self.dst_type, self.low, self.high, self.real),
        )

    def finished(self, names: set[str]) -> Activation:
        name = self.reader or first_reader(self.quantizes, self.dequantizes)
        return Activation(
            name=unique(name, names),
            source=self.source,
            scale_d=self.scale,
            offset_d=self.offset,
            dst_type=self.dst_type,
            low=self.low,
            high=self.high,
            real=self.real,
            quantizes=tuple(self.quantizes),
            dequantizes=tuple(self.dequantizes),
        )


@dataclass(frozen=True, eq=False)
class LayerWeight:
    """A layer's weight in the layout that ``QuantizedLayer`` promises.

    Attributes:
        integers: ``q - zero_point``; they need not fit int8.
        scale: Real size of one step, of length 1 or ``channels``.
        channel_axis: Axis of the output channels in ``integers``.
        channels: Number of output channels.
        wts_type: ``INT4`` where the model stores the weight as such and two fit into a byte.
    """

    integers: NDArray[np.integer[Any]]
    scale: NDArray[np.float32]
    channel_axis: int
    channels: int
    wts_type: WtsType


@dataclass(frozen=True, eq=False)
class LayerBias:
    real: Array | None
    add: ir.Node | None


def of_tensor(node: ir.Node, mismatch: Mismatch) -> Remark:
    """A remark on a node of a Q/DQ pair that names the tensor it reads, too."""
    reason, *remedy = mismatch.args
    return Remark(label(node), f"{reason} (tensor {node.inputs[0].name!r})", *remedy)  # type: ignore[union-attr]


def first_reader(quantizes: Iterable[ir.Node], dequantizes: Iterable[ir.Node]) -> str:
    """Name for a tensor that no layer reads: its first real reader's, else the output's."""
    outputs = [node.outputs[0] for node in (*dequantizes, *quantizes)]
    readers = [usage.node for value in outputs for usage in value.uses()]
    outside = [n for n in readers if n.op_type not in ("Clip", "DequantizeLinear")]
    if outside:
        return label(outside[0])
    named = [value.name for value in outputs if value.is_graph_output() and value.name]
    return named[0] if named else "activation"
