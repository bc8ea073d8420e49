"""The quantized part of a QDQ graph, read once: which layers compute with integers, and on which.

Matches structure, never names: ``QuantizeLinear -> [Clip] -> DequantizeLinear`` before a
convolution or a matrix product whose weight is ``DequantizeLinear`` of constant integers. Says what
the numbers are and changes nothing; how a target spells them is left to the target's own module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat_exporters._int4 import INPUT_AXIS, can_pack

Array = NDArray[Any]
DstType = Literal["INT8", "INT16"]
WtsType = Literal["INT8", "INT4"]

COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that run on integers; every other operator keeps real values."""

RECURRENT_OPS = ("LSTM", "GRU")
"""Those that a device may have one integer operator for."""

DEVICE_REMEDY = "CannExporter(rnn='device') writes the device's own node for it"

_INT8 = np.iinfo(np.int8)
_INT4 = ir.DataType.INT4.numpy()
_PASS_ON = ("Transpose", "Identity", "Cast")
_REAL = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# A grid of unsigned integers is the signed grid shifted by half its size.
_GRIDS: dict[np.dtype[Any], tuple[DstType, int]] = {
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


def find_quantized(model: ir.Model) -> QuantizedGraph:
    """Find the quantized tensors and layers of a QDQ model; the model stays as it is.

    Pairs that read the same tensor with the same scale, zero point, type and range are one
    ``Activation``. Layers with equal node names get ``name``, ``name_1``, and so on.

    Args:
        model: The QDQ model. Functions must be inlined; subgraphs are not searched.

    Returns:
        The findings. Nothing is raised: what cannot be expressed is listed in ``problems``.
    """
    problems: list[Remark] = []
    grids: dict[tuple[Any, ...], _Grid] = {}
    of_node: dict[ir.Node, _Grid] = {}
    for node in model.graph:
        if node.op_type == "QuantizeLinear" and not is_constant(node.inputs[0]):
            try:
                pair = _activation_pair(node)
            except Mismatch as mismatch:
                problems.append(_of_tensor(node, mismatch))
                continue
            grid = grids.setdefault(pair.key, pair)
            if grid is not pair:
                grid.quantizes += pair.quantizes
                grid.dequantizes += pair.dequantizes
            of_node.update(dict.fromkeys(pair.dequantizes, grid))
        elif weight_dequantize(node.outputs[0]) is node:
            try:
                _check_constant(node)
            except Mismatch as mismatch:
                problems.append(_of_tensor(node, mismatch))
        elif node.op_type == "DequantizeLinear" and _unpaired(node):
            unpaired = Mismatch("no QuantizeLinear makes the integers it reads")
            problems.append(_of_tensor(node, unpaired))

    left_float: list[Remark] = []
    found: list[tuple[str, ir.Node, _Grid, ir.DataType, LayerWeight, _Bias]] = []
    names: set[str] = set()
    for node in model.graph:
        if node.op_type not in COMPUTE_OPS or node.domain:
            passes_on = node.op_type in (*_PASS_ON, "DequantizeLinear")
            if not passes_on and any(weight_dequantize(v) is not None for v in node.inputs):
                remedy = DEVICE_REMEDY if node.op_type in RECURRENT_OPS else ""
                reason = f"{node.op_type} keeps real weights"
                left_float.append(Remark(label(node), reason, remedy))
            continue
        try:
            layer_grid, real = _layer_grid(node, of_node)
            weight = layer_weight(node)
            _require_usable(weight, layer_grid)
            bias = _layer_bias(node, weight)
        except _Unfit as unfit:
            problems.append(Remark(label(node), *unfit.args))
        except Mismatch as mismatch:
            left_float.append(Remark(label(node), *mismatch.args))
        else:
            name = unique(label(node), names)
            layer_grid.reader = layer_grid.reader or name
            found.append((name, node, layer_grid, real, weight, bias))

    names = set()
    activations = {id(grid): grid.finished(names) for grid in grids.values()}
    layers = tuple(
        QuantizedLayer(
            name=name,
            node=node,
            activation=activations[id(grid)],
            weight=weight.integers.astype(np.int8, copy=False),
            scale_w=weight.scale,
            channel_axis=weight.channel_axis,
            bias=bias.real,
            add=bias.add,
            real=real,
            wts_type=weight.wts_type,
        )
        for name, node, grid, real, weight, bias in found
    )
    return QuantizedGraph(tuple(activations.values()), layers, tuple(left_float), tuple(problems))


def joins(found: QuantizedGraph) -> tuple[str, ...]:
    """Nodes that are no layers and read real values from a quantized tensor, each once."""
    layers = {layer.node for layer in found.layers}
    return tuple(
        dict.fromkeys(
            label(reader)
            for activation in found.activations
            for node in activation.dequantizes
            for reader in _readers(node.outputs[0])
            if reader not in layers and reader.op_type != "QuantizeLinear"
        )
    )


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """What reads a tensor, also cast or transposed."""
    for node in value.consumers():
        if node.op_type in _PASS_ON:
            yield from _readers(node.outputs[0])
        else:
            yield node


def integer_outputs(found: QuantizedGraph) -> tuple[str, ...]:
    """Graph outputs that are the integers of a quantized tensor."""
    return tuple(
        value.name or ""
        for activation in found.activations
        for node in activation.quantizes
        for value in (node.outputs[0], *(n.outputs[0] for n in node.outputs[0].consumers()))
        if value.is_graph_output() and value.producer() not in activation.dequantizes
    )


def unique(name: str, taken: set[str]) -> str:
    """Return ``name``, or ``name_1``, ``name_2``, ... if taken, and take it.

    >>> taken = {"fc"}
    >>> unique("fc", taken), unique("fc", taken)
    ('fc_1', 'fc_2')
    """
    candidate, count = name, 0
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``constant`` has an array for ``value``; computes none."""
    while value is not None and ir.convenience.get_const_tensor(value) is None:
        node = value.producer()
        if node is None or node.op_type not in _PASS_ON:
            return False
        value = node.inputs[0]
    return value is not None


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node, also cast and transposed; else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return np.asarray(tensor.numpy())
    node = None if value is None else value.producer()
    if node is None or node.op_type not in _PASS_ON:
        return None
    array = constant(node.inputs[0])
    if array is None or node.op_type == "Identity":
        return array
    if node.op_type == "Cast":
        return array.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())
    return array.transpose(node.attributes.get_ints("perm", range(array.ndim)[::-1]))


def real_constant(value: ir.Value | None) -> Array | None:
    """The real values of a constant that may be stored as integers and a DequantizeLinear.

    ``(q - zero_point) * scale`` as ONNX ``DequantizeLinear`` defines it. A quantized 32-bit
    integer is multiplied in float64, where the product is exact.

    Returns:
        Float values in the constant's own layout, or None where ``value`` is no such constant.
    """
    plain = constant(value)
    if plain is not None:
        return plain if np.issubdtype(plain.dtype, np.floating) else None
    dequantize = weight_dequantize(value)
    if dequantize is None:
        return None
    integers, zero_point = _integers(dequantize)
    scale = _array(dequantize.inputs[1], "scale")
    axis = dequantize.attributes.get_int("axis", 1)
    kind = np.float64 if integers.itemsize >= 4 else np.float32
    difference = integers.astype(np.int64) - _along(zero_point, integers.ndim, axis)
    real = difference.astype(kind) * _along(scale, integers.ndim, axis)
    for perm in _permutations(value, real.ndim):
        real = real.transpose(perm)
    return real


class Mismatch(Exception):
    """The structure is another one; the arguments are the reason and, maybe, a remedy."""


class _Unfit(Exception):
    """The structure is right and its numbers cannot be expressed; arguments as above."""


@dataclass(eq=False)
class _Grid:
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
        name = self.reader or _first_reader(self.quantizes, self.dequantizes)
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
class _Bias:
    real: Array | None
    add: ir.Node | None


def _of_tensor(node: ir.Node, mismatch: Mismatch) -> Remark:
    """A remark on a node of a Q/DQ pair that names the tensor it reads, too."""
    reason, *remedy = mismatch.args
    return Remark(label(node), f"{reason} (tensor {node.inputs[0].name!r})", *remedy)  # type: ignore[union-attr]


def label(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _first_reader(quantizes: Iterable[ir.Node], dequantizes: Iterable[ir.Node]) -> str:
    """Name for a tensor that no layer reads: its first real reader's, else the output's."""
    outputs = [node.outputs[0] for node in (*dequantizes, *quantizes)]
    readers = [usage.node for value in outputs for usage in value.uses()]
    outside = [n for n in readers if n.op_type not in ("Clip", "DequantizeLinear")]
    if outside:
        return label(outside[0])
    named = [value.name for value in outputs if value.is_graph_output() and value.name]
    return named[0] if named else "activation"


def _array(value: ir.Value | None, what: str) -> Array:
    array = constant(value)
    if array is None:
        raise Mismatch(f"the {what} must be a constant")
    return array


def _along(array: Array, rank: int, axis: int) -> Array:
    """A per-tensor or per-axis parameter in a shape that broadcasts against a tensor."""
    if array.size == 1:
        return array.reshape(())
    shape = [1] * rank
    shape[axis] = array.size
    return array.reshape(shape)


def _unpaired(dequantize: ir.Node) -> bool:
    """Whether integers come from elsewhere than a QuantizeLinear or a constant."""
    value = dequantize.inputs[0]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Clip":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return not is_constant(value) and (node is None or node.op_type != "QuantizeLinear")


def _activation_pair(quantize: ir.Node) -> _Grid:
    """Read one QuantizeLinear of an activation with everything that hangs on its integers.

    Raises:
        Mismatch: The pair is none: several factors, other readers, other types.
    """
    scale, zero_point, dtype = _factors(quantize)
    if scale.size != 1 or zero_point.size != 1:
        raise Mismatch(
            f"an activation must have one scale and one zero point; got {scale.size} scales and "
            f"{zero_point.size} zero points",
            "Quantize activations per tensor",
        )
    if dtype not in _GRIDS:
        raise Mismatch(
            f"activations must be int8, uint8, int16 or uint16; got {dtype}",
            "Quantize the activation with 8 or 16 bits",
        )
    step = np.float32(scale.reshape(()))
    if not usable_scale(step):
        raise Mismatch(
            f"a scale must be positive, and it and its reciprocal normal float32; got {step!r}",
            "Calibrate the tensor again, or leave it real",
        )
    real = ir.DataType.from_numpy(scale.dtype)
    if real not in _REAL:
        raise Mismatch(
            f"the tensor must be float32 or float16; its scale is {real.name}",
            "Convert the model to one of the two",
        )
    dst_type, shift = _GRIDS[dtype]
    low, high = type_range(dst_type)
    source = quantize.inputs[0]
    assert source is not None  # QuantizeLinear's first input is not optional
    integers = quantize.outputs[0]
    clips = [n for n in integers.consumers() if n.op_type == "Clip"]
    if clips:
        if len(integers.consumers()) > 1 or integers.is_graph_output():
            raise Mismatch("the integers must be read either by one Clip or by DequantizeLinear")
        bounds = [*clips[0].inputs, None, None][1:3]
        ends = [
            None if v is None else int(_array(v, "bound of a Clip").reshape(())) for v in bounds
        ]
        low = low if ends[0] is None else max(low, ends[0] - shift)
        high = high if ends[1] is None else min(high, ends[1] - shift)
        integers = clips[0].outputs[0]
    dequantizes = list(integers.consumers())
    for node in dequantizes:
        if node.op_type != "DequantizeLinear":
            raise Mismatch(f"its integers are read by {label(node)!r} ({node.op_type})")
        other = _factors(node)
        if not _same_factors((scale, zero_point, dtype), other, typed=len(node.inputs) > 2):
            raise Mismatch(
                f"QuantizeLinear and DequantizeLinear of a pair must share scale and zero point; "
                f"{label(node)!r} has others"
            )
    return _Grid(
        source=source,
        scale=step,
        offset=int(zero_point.reshape(())) - shift,
        dst_type=dst_type,
        low=low,
        high=high,
        real=real,
        quantizes=[quantize],
        dequantizes=dequantizes,
    )


def _factors(node: ir.Node) -> tuple[Array, Array, np.dtype[Any]]:
    """Scale, zero point and integer type of a QuantizeLinear or DequantizeLinear."""
    scale = _array(node.inputs[1], "scale").reshape(-1)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero_point = _array(node.inputs[2], "zero point")
        return scale, zero_point.reshape(-1).astype(np.int64), zero_point.dtype
    kind = node.attributes.get_int("output_dtype", 0)
    # ONNX QuantizeLinear: without zero point and output_dtype the integers are uint8.
    dtype = ir.DataType(kind).numpy() if kind else np.dtype(np.uint8)
    return scale, np.zeros(1, np.int64), dtype


def _same_factors(
    factors: tuple[Array, Array, np.dtype[Any]],
    other: tuple[Array, Array, np.dtype[Any]],
    *,
    typed: bool,
) -> bool:
    """Whether a DequantizeLinear undoes a QuantizeLinear; without zero point it has no type."""
    same = np.array_equal(factors[0], other[0]) and np.array_equal(factors[1], other[1])
    return same and (not typed or factors[2] == other[2])


def _layer_grid(node: ir.Node, of_node: dict[ir.Node, _Grid]) -> tuple[_Grid, ir.DataType]:
    """The grid that a layer reads, and the real type in which it reads it."""
    data, real = node.inputs[0], None
    producer = data.producer() if data is not None else None
    while producer is not None and producer.op_type in ("Identity", "Cast"):
        if producer.op_type == "Cast" and real is None:
            real = ir.DataType(producer.attributes.get_int("to", 1))
        data = producer.inputs[0]
        producer = data.producer() if data is not None else None
    quantized_weight = weight_dequantize(node.inputs[1]) is not None
    if producer is None or producer not in of_node:
        raise Mismatch(
            "its weight is quantized and its input is not"
            if quantized_weight
            else "neither its input nor its weight is quantized"
        )
    if not quantized_weight:
        raise Mismatch("its input is quantized and its weight is no quantized constant")
    grid = of_node[producer]
    if real is None:
        real = grid.real
    if real not in _REAL:
        raise Mismatch(f"it must compute in float32 or float16; it computes in {real.name}")
    return grid, real


def _require_usable(weight: LayerWeight, grid: _Grid) -> None:
    """Raise ``_Unfit`` for integers and scales that no integer layer can have."""
    integers, scale = weight.integers, weight.scale
    if integers.size and not (_INT8.min <= integers.min() and integers.max() <= _INT8.max):
        raise _Unfit(
            f"the weight's integers must fit int8; they run from {integers.min()} to "
            f"{integers.max()}",
            "Quantize the weight with 8 bits or fewer",
        )
    product = grid.scale * scale
    for what, values in (("the weight's scales", scale), ("scale_d * scale_w", product)):
        if not usable_scale(values):
            bad = values[~_usable(values)][0]
            raise _Unfit(
                f"{what} must be positive normal float32; got {bad!r}",
                "Quantize the layer again, or leave it real",
            )


def usable_scale(scale: Array | np.float32) -> bool:
    """Whether every scale and its reciprocal are positive normal float32 numbers.

    >>> usable_scale(np.float32(0.5)), usable_scale(np.float32(1e-39))
    (True, False)
    """
    return bool(np.all(_usable(scale)))


def _usable(scale: Array | np.float32) -> Array:
    smallest = np.finfo(np.float32).tiny
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        reciprocal = np.float32(1) / np.float32(scale)
    usable: Array = np.isfinite(scale) & (scale >= smallest) & (reciprocal >= smallest)
    return usable


def weight_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a constant behind ``value``, through Transpose and Identity."""
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _PASS_ON:
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return None
    value = node.inputs[0]
    inner = value.producer() if value is not None else None
    while inner is not None and inner.op_type in ("Clip", "QuantizeLinear"):
        value = inner.inputs[0]
        inner = value.producer() if value is not None else None
    return node if is_constant(value) else None


def _check_constant(dequantize: ir.Node) -> None:
    """Raise ``Mismatch`` where the factors of a quantized constant cannot be meant."""
    source = dequantize.inputs[0]
    while (node := None if source is None else source.producer()) and node.op_type != "Constant":
        if node.op_type == "QuantizeLinear":
            scale, zero_point, dtype = _factors(node)
            other = _factors(dequantize)
            typed = len(dequantize.inputs) > 2
            if not _same_factors((scale, zero_point, dtype), other, typed=typed):
                raise Mismatch(
                    "QuantizeLinear and DequantizeLinear of a constant must share scale and zero "
                    f"point; {label(node)!r} has others"
                )
        source = node.inputs[0]
    scale, zero_point, _ = _factors(dequantize)
    if dequantize.attributes.get_int("block_size", 0):
        return
    shape = dequantize.inputs[0].shape if dequantize.inputs[0] is not None else None
    axis = dequantize.attributes.get_int("axis", 1)
    for what, factors in (("scales", scale), ("zero points", zero_point)):
        if factors.size > 1 and shape is not None and not _runs_along(factors, shape, axis):
            raise Mismatch(
                f"a constant of shape {list(shape)} must have one scale and zero point, or as many "
                f"as its axis {axis} is long; got {factors.size} {what}"
            )
    if not usable_scale(scale):
        bad = scale[~_usable(scale)][0]
        raise Mismatch(f"scales must be positive normal float32; got {bad!r}")


def _runs_along(factors: Array, shape: ir.Shape, axis: int) -> bool:
    known = -len(shape) <= axis < len(shape)
    return known and (not isinstance(shape[axis], int) or shape[axis] == factors.size)


def _integers(dequantize: ir.Node) -> tuple[Array, Array]:
    """Stored integers and zero point under a DequantizeLinear of a constant.

    A constant that is still float before a QuantizeLinear is quantized here as ONNX defines it:
    ``saturate(rint(x / scale) + zero_point)``.
    """
    zero_point = _factors(dequantize)[1]
    value = dequantize.inputs[0]
    stored = constant(value)
    if stored is not None:
        return stored, zero_point
    node = value.producer() if value is not None else None
    bounds: list[ir.Value | None] = []
    if node is not None and node.op_type == "Clip":
        bounds = [*node.inputs, None, None][1:3]
        inner = node.inputs[0]
        node = inner.producer() if inner is not None else None
    real = constant(node.inputs[0]) if node is not None else None
    if node is None or node.op_type != "QuantizeLinear" or real is None:
        raise Mismatch("the weight must be constant integers or a quantized constant")
    scale, zero_point, dtype = _factors(node)
    if not np.isfinite(real).all():
        raise _Unfit("the weight must be finite; it holds NaN or infinity")
    axis = node.attributes.get_int("axis", 1)
    levels = np.rint(real / _along(scale, real.ndim, axis))
    limits = ir.DataType.from_numpy(dtype)
    levels = np.clip(levels + _along(zero_point, real.ndim, axis), limits.min, limits.max)
    for bound, side in zip(bounds, (np.maximum, np.minimum), strict=False):
        if bound is not None:
            levels = side(levels, _array(bound, "bound of a Clip"))
    return levels.astype(np.int64).astype(dtype), zero_point


class Stored(NamedTuple):
    """Integers around zero of a quantized constant, their scale or scales, and the scales' axis."""

    integers: Array
    scale: NDArray[np.float32]
    axis: int
    dtype: np.dtype[Any]


def stored_integers(value: ir.Value | None) -> Stored:
    """The integers of a quantized constant, also transposed, its zero point taken off.

    Raises:
        Mismatch: Its scales are of blocks, or it is no constant.
    """
    dequantize = weight_dequantize(value)
    if dequantize is None:
        raise Mismatch("its weight is no quantized constant")
    stored, zero_point = _integers(dequantize)
    scale = _array(dequantize.inputs[1], "scale").astype(np.float32)
    if scale.ndim > 1 or dequantize.attributes.get_int("block_size", 0) > 0:
        raise Mismatch("its weight has one scale per block; use one per tensor or per channel")
    axis: int = dequantize.attributes.get_int("axis", 1) % max(stored.ndim, 1)
    integers = stored
    if zero_point.any():
        wide = np.int16 if stored.dtype.itemsize == 1 else np.int64
        integers = stored.astype(wide) - _along(zero_point, stored.ndim, axis).astype(wide)
    for perm in _permutations(value, integers.ndim):
        integers, axis = integers.transpose(perm), perm.index(axis)
    return Stored(integers, scale.reshape(-1), axis, stored.dtype)


def layer_weight(node: ir.Node) -> LayerWeight:
    """Integers and scale of a layer's weight, in the layout that ``QuantizedLayer`` promises."""
    integers, scale, axis, dtype = stored_integers(node.inputs[1])
    attributes = node.attributes
    if node.op_type in ("Gemm", "MatMul"):
        if integers.ndim != 2:
            raise Mismatch(f"its weight must be a matrix; got shape {list(integers.shape)}")
        if attributes.get_int("transB", 0):
            integers, axis = integers.T, 1 - axis
    if node.op_type == "Gemm":
        factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
        if attributes.get_int("transA", 0) or factors != (1.0, 1.0):
            raise Mismatch("a quantized Gemm must have transA = 0 and alpha = beta = 1")
    channel_axis = 0 if node.op_type == "Conv" else 1
    groups = attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    channels = integers.shape[channel_axis] * groups
    if scale.size > 1:
        if axis != channel_axis:
            raise Mismatch(
                f"its weight's scales must run along the output channels (axis {channel_axis}); "
                f"they run along axis {axis}"
            )
        # ConvTranspose stores Cout/g channels: every group uses the same scales.
        scale = np.tile(scale, groups)
    groups = attributes.get_int("group", 1)
    packed = dtype == _INT4 and can_pack(integers.shape[INPUT_AXIS[node.op_type]], groups)
    return LayerWeight(integers, scale, channel_axis, channels, "INT4" if packed else "INT8")


def _permutations(value: ir.Value | None, rank: int) -> list[list[int]]:
    """The Transposes between the DequantizeLinear and its reader, first applied first."""
    perms: list[list[int]] = []
    node = value.producer() if value is not None else None
    while node is not None and node.op_type in _PASS_ON:
        if node.op_type == "Transpose":
            perms.append(list(node.attributes.get_ints("perm", range(rank)[::-1])))
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    return perms[::-1]


def _layer_bias(node: ir.Node, weight: LayerWeight) -> _Bias:
    if node.op_type == "MatMul":
        return _added_bias(node, weight.channels)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return _Bias(None, None)
    real = real_constant(node.inputs[2])
    if real is None:
        raise Mismatch("its bias must be a constant")
    if real.size not in (1, weight.channels) or (real.ndim and real.shape[-1] != real.size):
        raise Mismatch(f"its bias must be one number per output channel; got {list(real.shape)}")
    return _Bias(np.broadcast_to(real.reshape(-1), (weight.channels,)), None)


def _added_bias(node: ir.Node, channels: int) -> _Bias:
    """The bias of a linear layer on more than two dimensions: MatMul, then Add of a constant."""
    consumers = list(node.outputs[0].consumers())
    if len(consumers) == 1 and consumers[0].op_type == "Add":
        for value in _others(consumers[0], node.outputs[0]):
            real = real_constant(value)
            if real is not None and real.shape[-1:] == (channels,) and real.size == channels:
                return _Bias(real.reshape(-1), consumers[0])
    return _Bias(None, None)


def _others(node: ir.Node, value: ir.Value) -> Iterator[ir.Value]:
    for other in node.inputs:
        if other is not None and other is not value:
            yield other
