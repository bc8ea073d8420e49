"""The quantized part of a QDQ graph, read once: which layers compute with integers, and on which.

Matches structure, never names: ``QuantizeLinear -> [Clip] -> DequantizeLinear`` before a
convolution or a matrix product whose weight is ``DequantizeLinear`` of constant integers. Says what
the numbers are and changes nothing; how a target spells them is left to the target's own module.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lightning_qat_exporters._int4 import INPUT_AXIS, can_pack

Array = NDArray[Any]
DstType = Literal["INT8", "INT16"]
WtsType = Literal["INT8", "INT4"]

COMPUTE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operators that run on integers; every other operator keeps real values."""

_INT8 = np.iinfo(np.int8)
_INT4 = ir.DataType.INT4.numpy()
_PASS_ON = ("Transpose", "Identity")
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
        node: The compute node; its input 0 is a DequantizeLinear of ``activation``.
        activation: The grid of the layer's input.
        weight: Integers: Conv ``[Cout, Cin/g, k...]``, ConvTranspose ``[Cin, Cout/g, k...]``,
            Gemm and MatMul ``[in, out]`` whatever ``transB`` says.
        scale_w: Real size of one step of the weight, of length 1 or Cout.
        channel_axis: Axis of the output channels in ``weight``.
        bias: Real bias of length Cout, or None. Float64 where the model stores scaled integers.
        add: The Add that brings the bias of a MatMul; None where ``node`` reads the bias itself.
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
        if node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is None:
            try:
                pair = _activation_pair(node)
            except _Mismatch as mismatch:
                problems.append(Remark(_label(node), *mismatch.args))
                continue
            grid = grids.setdefault(pair.key, pair)
            if grid is not pair:
                grid.quantizes += pair.quantizes
                grid.dequantizes += pair.dequantizes
            of_node.update(dict.fromkeys(pair.dequantizes, grid))
        elif node.op_type == "DequantizeLinear" and _unpaired(node):
            problems.append(Remark(_label(node), "no QuantizeLinear makes the integers it reads"))

    left_float: list[Remark] = []
    found: list[tuple[str, ir.Node, _Grid, _Weight, _Bias]] = []
    names: set[str] = set()
    for node in model.graph:
        if node.op_type not in COMPUTE_OPS or node.domain:
            passes_on = node.op_type in (*_PASS_ON, "DequantizeLinear")
            if not passes_on and any(_weight_dequantize(v) is not None for v in node.inputs):
                left_float.append(Remark(_label(node), f"{node.op_type} keeps real weights"))
            continue
        try:
            layer_grid = _layer_grid(node, of_node)
            weight = _layer_weight(node)
            bias = _layer_bias(node, weight)
        except _Unfit as unfit:
            problems.append(Remark(_label(node), *unfit.args))
        except _Mismatch as mismatch:
            left_float.append(Remark(_label(node), *mismatch.args))
        else:
            name = unique(_label(node), names)
            layer_grid.reader = layer_grid.reader or name
            found.append((name, node, layer_grid, weight, bias))

    names = set()
    activations = {id(grid): grid.finished(names) for grid in grids.values()}
    layers = tuple(
        QuantizedLayer(
            name=name,
            node=node,
            activation=activations[id(grid)],
            weight=weight.integers.astype(np.int8),
            scale_w=weight.scale,
            channel_axis=weight.channel_axis,
            bias=bias.real,
            add=bias.add,
            wts_type=weight.wts_type,
        )
        for name, node, grid, weight, bias in found
    )
    return QuantizedGraph(tuple(activations.values()), layers, tuple(left_float), tuple(problems))


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


def constant(value: ir.Value | None) -> Array | None:
    """The array of an initializer or Constant node, also behind Identity; else None."""
    while value is not None:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return np.asarray(tensor.numpy())
        node = value.producer()
        if node is None or node.op_type != "Identity":
            return None
        value = node.inputs[0]
    return None


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
    dequantize = _weight_dequantize(value)
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


class _Mismatch(Exception):
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
    quantizes: list[ir.Node] = field(default_factory=list)
    dequantizes: list[ir.Node] = field(default_factory=list)
    reader: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        return (
            *(id(self.source), self.scale.tobytes(), self.offset),
            *(self.dst_type, self.low, self.high),
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
            quantizes=tuple(self.quantizes),
            dequantizes=tuple(self.dequantizes),
        )


@dataclass(frozen=True, eq=False)
class _Weight:
    integers: NDArray[np.int64]
    scale: NDArray[np.float32]
    channel_axis: int
    channels: int
    wts_type: WtsType


@dataclass(frozen=True, eq=False)
class _Bias:
    real: Array | None
    add: ir.Node | None


def _label(node: ir.Node) -> str:
    return node.name or node.outputs[0].name or node.op_type


def _first_reader(quantizes: Iterable[ir.Node], dequantizes: Iterable[ir.Node]) -> str:
    """Name for a tensor that no layer reads: its first real reader's, else the output's."""
    outputs = [node.outputs[0] for node in (*dequantizes, *quantizes)]
    readers = [usage.node for value in outputs for usage in value.uses()]
    outside = [n for n in readers if n.op_type not in ("Clip", "DequantizeLinear")]
    if outside:
        return _label(outside[0])
    named = [value.name for value in outputs if value.is_graph_output() and value.name]
    return named[0] if named else "activation"


def _array(value: ir.Value | None, what: str) -> Array:
    array = constant(value)
    if array is None:
        raise _Mismatch(f"the {what} must be a constant")
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
    return constant(value) is None and (node is None or node.op_type != "QuantizeLinear")


def _activation_pair(quantize: ir.Node) -> _Grid:
    """Read one QuantizeLinear of an activation with everything that hangs on its integers.

    Raises:
        _Mismatch: The pair is none: several factors, other readers, other types.
    """
    scale, zero_point, dtype = _factors(quantize)
    if scale.size != 1 or zero_point.size != 1:
        raise _Mismatch(
            f"an activation must have one scale and one zero point; got {scale.size} scales and "
            f"{zero_point.size} zero points",
            "Quantize activations per tensor",
        )
    if dtype not in _GRIDS:
        raise _Mismatch(
            f"activations must be int8, uint8, int16 or uint16; got {dtype}",
            "Quantize the activation with 8 or 16 bits",
        )
    step = np.float32(scale.reshape(()))
    with np.errstate(over="ignore"):
        usable = np.isfinite(step) and step > 0 and np.isfinite(np.float32(1) / step)
    if not usable:
        raise _Mismatch(f"a scale must be positive, and it and its reciprocal finite; got {step!r}")
    dst_type, shift = _GRIDS[dtype]
    low, high = type_range(dst_type)
    source = quantize.inputs[0]
    assert source is not None  # QuantizeLinear's first input is not optional
    integers = quantize.outputs[0]
    clips = [n for n in integers.consumers() if n.op_type == "Clip"]
    if clips:
        if len(integers.consumers()) > 1 or integers.is_graph_output():
            raise _Mismatch("the integers must be read either by one Clip or by DequantizeLinear")
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
            raise _Mismatch(f"its integers are read by {_label(node)!r} ({node.op_type})")
        other_scale, other_zero, _ = _factors(node)
        if not (np.array_equal(other_scale, scale) and np.array_equal(other_zero, zero_point)):
            raise _Mismatch(
                f"QuantizeLinear and DequantizeLinear of a pair must share scale and zero point; "
                f"{_label(node)!r} has others"
            )
    return _Grid(
        source=source,
        scale=step,
        offset=int(zero_point.reshape(())) - shift,
        dst_type=dst_type,
        low=low,
        high=high,
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


def _layer_grid(node: ir.Node, of_node: dict[ir.Node, _Grid]) -> _Grid:
    data = node.inputs[0]
    producer = data.producer() if data is not None else None
    quantized_weight = _weight_dequantize(node.inputs[1]) is not None
    if producer is None or producer not in of_node:
        raise _Mismatch(
            "its weight is quantized and its input is not"
            if quantized_weight
            else "neither its input nor its weight is quantized"
        )
    if not quantized_weight:
        raise _Mismatch("its input is quantized and its weight is no quantized constant")
    return of_node[producer]


def _weight_dequantize(value: ir.Value | None) -> ir.Node | None:
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
    return node if constant(value) is not None else None


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
        raise _Mismatch("the weight must be constant integers or a quantized constant")
    scale, zero_point, dtype = _factors(node)
    axis = node.attributes.get_int("axis", 1)
    levels = np.rint(real / _along(scale, real.ndim, axis))
    limits = ir.DataType.from_numpy(dtype)
    levels = np.clip(levels + _along(zero_point, real.ndim, axis), limits.min, limits.max)
    for bound, side in zip(bounds, (np.maximum, np.minimum), strict=False):
        if bound is not None:
            levels = side(levels, _array(bound, "bound of a Clip"))
    return levels.astype(np.int64).astype(dtype), zero_point


def _layer_weight(node: ir.Node) -> _Weight:
    """Integers and scale of a layer's weight, in the layout that ``QuantizedLayer`` promises."""
    dequantize = _weight_dequantize(node.inputs[1])
    assert dequantize is not None  # _layer_grid looked
    stored, zero_point = _integers(dequantize)
    scale = _array(dequantize.inputs[1], "scale").astype(np.float32)
    if scale.ndim > 1 or dequantize.attributes.get_int("block_size", 0) > 0:
        raise _Mismatch("its weight has one scale per block; use one per tensor or per channel")
    axis: int = dequantize.attributes.get_int("axis", 1) % max(stored.ndim, 1)
    integers = stored.astype(np.int64) - _along(zero_point, stored.ndim, axis)
    for perm in _permutations(node.inputs[1], integers.ndim):
        integers, axis = integers.transpose(perm), perm.index(axis)
    attributes = node.attributes
    if node.op_type in ("Gemm", "MatMul"):
        if integers.ndim != 2:
            raise _Mismatch(f"its weight must be a matrix; got shape {list(integers.shape)}")
        if attributes.get_int("transB", 0):
            integers, axis = integers.T, 1 - axis
    if node.op_type == "Gemm":
        factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
        if attributes.get_int("transA", 0) or factors != (1.0, 1.0):
            raise _Mismatch("a quantized Gemm must have transA = 0 and alpha = beta = 1")
    channel_axis = 0 if node.op_type == "Conv" else 1
    groups = attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
    channels = integers.shape[channel_axis] * groups
    scale = scale.reshape(-1)
    if scale.size > 1:
        if axis != channel_axis:
            raise _Mismatch(
                f"its weight's scales must run along the output channels (axis {channel_axis}); "
                f"they run along axis {axis}"
            )
        # ConvTranspose stores Cout/g channels: every group uses the same scales.
        scale = np.tile(scale, groups)
    if integers.size and not (_INT8.min <= integers.min() and integers.max() <= _INT8.max):
        raise _Unfit(
            f"the weight's integers must fit int8; they run from {integers.min()} to "
            f"{integers.max()}",
            "Quantize the weight with 8 bits or fewer",
        )
    if not (np.all(np.isfinite(scale)) and np.all(scale > 0)):
        raise _Unfit("the weight's scales must be positive and finite")
    groups = attributes.get_int("group", 1)
    packed = stored.dtype == _INT4 and can_pack(integers.shape[INPUT_AXIS[node.op_type]], groups)
    return _Weight(integers, scale, channel_axis, channels, "INT4" if packed else "INT8")


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


def _layer_bias(node: ir.Node, weight: _Weight) -> _Bias:
    if node.op_type == "MatMul":
        return _added_bias(node, weight.channels)
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return _Bias(None, None)
    real = real_constant(node.inputs[2])
    if real is None:
        raise _Mismatch("its bias must be a constant")
    if real.size not in (1, weight.channels) or (real.ndim and real.shape[-1] != real.size):
        raise _Mismatch(f"its bias must be one number per output channel; got {list(real.shape)}")
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
