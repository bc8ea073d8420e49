"""Run a CANN deploy model in NumPy: the reference for what its integers mean.

The integer layers are computed exactly and the scalings in float32, by the definitions of Ascend's
operators. Every other operator is left to ``onnx.reference``, except the pools, which are slow
there, and batch norm. No claim about the last bit on a device: many of its kernels quantize in
float16, which ``device_fp16`` simulates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from lightning_qat_exporters import _ascend_recurrent
from lightning_qat_exporters._int4 import unpacked

Array = NDArray[Any]

_DOMAIN = "lightning_qat.reference"
_INT32 = np.iinfo(np.int32)
_EXACT_IN_FLOAT32 = 2**24
_DTYPES: Mapping[str, np.dtype[np.signedinteger[Any]]] = {
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
}
_ROUND: Mapping[str, Callable[[Array], Array]] = {
    # CANN AscendQuant's round_mode; "Round" goes half to even.
    "Round": np.rint,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Trunc": np.trunc,
}
# Memory for the unfolded windows of one block of images.
_BLOCK_BYTES = 2**26


class AscendExecutor:
    """A deploy model, ready to run on arrays.

    Integer layers: ``acc = layer(q - offset_d, W, zero padding) + B``, exact in BLAS, in
    floats that hold every integer that can occur. ``q = clip(rint(x * scale) + offset)``, as in
    AMCT's fake-quant model; CANN's text rounds after adding, which differs on exact ties alone.
    ``y = float32(acc) * scale`` with the low 32 bits of the dequant parameter as a float32.

    A weight with half as many input channels as its data is packed, two of 4 bits to a byte.

    Args:
        model: Path of a deploy model, or the model itself.
        device_fp16: Quantize as AscendQuant's kernels without float32 do: data, scale and offset
            become float16, and so do their product and their sum, which is rounded last.

    Raises:
        ValueError: An operator asks for what is not defined here: an unknown ``round_mode`` or
            ``dtype``, a dequant parameter with more than a float32 in it, an AscendDequant that
            no integer layer feeds.
    """

    def __init__(
        self,
        model: str | PathLike[str] | onnx.ModelProto | ir.Model,
        *,
        device_fp16: bool = False,
    ) -> None:
        if isinstance(model, ir.Model):
            proto = ir.to_proto(model)
        elif isinstance(model, onnx.ModelProto):
            proto = model
        else:
            proto = onnx.load(model)
        self.input_names = tuple(value.name for value in proto.graph.input)
        self.output_names = tuple(value.name for value in proto.graph.output)
        self._evaluator = ReferenceEvaluator(_resolved(proto, device_fp16), new_ops=list(_OPS))

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Compute the model's outputs.

        Args:
            inputs: One array per input name.

        Returns:
            One array per output name, in order.

        Raises:
            ValueError: The names are not the model's, a tensor to quantize holds NaN, or an
                accumulator of 8-bit data leaves int32.
        """
        if set(inputs) != set(self.input_names):
            raise ValueError(
                f"The inputs must be {sorted(self.input_names)}; got {sorted(inputs)}."
            )
        outputs = self._evaluator.run(None, dict(inputs))
        return [np.array(output, order="C") for output in outputs]


def _resolved(model: onnx.ModelProto, device_fp16: bool) -> onnx.ModelProto:
    """A copy in which every operator computed here says all it needs to know by itself.

    A layer learns its input's offset from the AscendQuant before it, an AscendDequant its channel
    axis from the layer before it.
    """
    resolved = onnx.ModelProto()
    resolved.CopyFrom(model)
    resolved.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    names = {op.__name__ for op in _OPS}
    producers: dict[str, onnx.NodeProto] = {}
    for node in resolved.graph.node:
        for output in node.output:
            producers[output] = node
        before = producers.get(node.input[0]) if node.input else None
        quantized = before is not None and before.op_type == "AscendQuant"
        if node.op_type not in names or (node.op_type in ("Gemm", "MatMul") and not quantized):
            continue
        extra: dict[str, Any] = {"label": node.name}
        if quantized and node.op_type in _LAYERS:
            assert before is not None
            extra["offset"] = _attributes(before).get("offset", 0.0)
        if node.op_type == "AscendQuant":
            extra["half"] = int(device_fp16)
        if node.op_type == "AscendDequant":
            if before is None or before.op_type not in _LAYERS:
                raise ValueError(
                    "An AscendDequant must read the accumulator of one of "
                    f"{sorted(_LAYERS)}; {node.name!r} reads {node.input[0]!r}."
                )
            extra["axis"] = 1 if before.op_type in ("Conv", "ConvTranspose") else -1
        node.domain = _DOMAIN
        node.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in extra.items())
    return resolved


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


class AscendQuant(OpRun):
    """``clip(round(x * scale) + offset)``; ``sqrt_mode`` multiplies by ``scale`` twice.

    With ``half``, ``clip(round(x * scale + offset))`` with float16 after every operation, as in
    CANN's public kernels of this operator.
    """

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        half: int,
        scale: float,
        offset: float = 0.0,
        sqrt_mode: int = 0,
        round_mode: str = "Round",
        dst_type: str = "INT8",
    ) -> tuple[Array]:
        _require(label, "dst_type", dst_type, _DTYPES)
        _require(label, "round_mode", round_mode, _ROUND)
        if np.isnan(x).any():
            raise ValueError(f"{label!r} cannot quantize NaN; its input holds some.")
        # A device's floats become infinite and saturate where they are too large.
        with np.errstate(over="ignore"):
            real = np.dtype(np.float16 if half else np.float32).type
            if not np.isfinite(real(scale)):
                raise ValueError(f"The scale of {label!r} must fit float16; got {scale:g}.")
            steps = x.astype(real) * real(scale)
            if sqrt_mode:
                steps = steps * real(scale)
            rounded = _ROUND[round_mode]
            levels = rounded(steps + real(offset)) if half else rounded(steps) + real(offset)
        dtype = _DTYPES[dst_type]
        limits = np.iinfo(dtype)
        # float16 has no 32767.
        return (np.clip(levels.astype(np.float32), limits.min, limits.max).astype(dtype),)


class AscendAntiQuant(OpRun):
    """``(q - offset) * scale``; ``sqrt_mode`` multiplies by ``scale`` twice."""

    op_domain = _DOMAIN

    def _run(
        self,
        q: Array,
        *,
        label: str,
        scale: float,
        offset: float = 0.0,
        sqrt_mode: int = 0,
        dtype: int = 0,
    ) -> tuple[Array]:
        _require(label, "dtype", dtype, _REALS)
        real = (q.astype(np.float32) - np.float32(offset)) * np.float32(scale)
        if sqrt_mode:
            real = real * np.float32(scale)
        return (real.astype(_REALS[dtype]),)


class AscendDequant(OpRun):
    """``float32(acc) * scale``; ``sqrt_mode`` multiplies twice, ``relu_flag`` clamps at 0."""

    op_domain = _DOMAIN

    def _run(
        self,
        accumulator: Array,
        param: Array,
        *,
        label: str,
        axis: int,
        sqrt_mode: int = 0,
        relu_flag: int = 0,
        dtype: int = 0,
    ) -> tuple[Array]:
        _require(label, "dtype", dtype, _REALS)
        bits = param.astype(np.uint64)
        if (bits >> np.uint64(32)).any():
            raise ValueError(
                f"The parameter of {label!r} must be a float32 in the low 32 bits; the high bits "
                "hold an offset or a shift, which this executor does not know."
            )
        scale = bits.astype(np.uint32).view(np.float32)
        if scale.size > 1:
            shape = [1] * accumulator.ndim
            shape[axis] = scale.size
            scale = scale.reshape(shape)
        real = accumulator.astype(np.float32) * scale
        if sqrt_mode:
            real = real * scale
        if relu_flag:
            real = np.maximum(real, np.float32(0))
        return (real.astype(_REALS[dtype]),)


_REALS = {0: np.float32, 1: np.float16}
"""Values of the attribute ``dtype``: ONNX's order, as CANN's operators count."""


class Conv(OpRun):
    """A convolution of 1 to 3 dimensions, exact on integers, float32 on real values."""

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        if group == 1:
            weight = unpacked(weight, 1, x.shape[1])
        if x.shape[1] != weight.shape[1] * group:
            raise ValueError(
                f"{label!r} has {x.shape[1]} input channels and a weight for "
                f"{weight.shape[1] * group}."
            )
        kernel = weight.shape[2:]
        strides, dilations = _filled(strides, kernel), _filled(dilations, kernel)
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=0)
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
        begin, end = _padding(auto_pad, pads, x.shape[2:], spans, strides)
        result = _correlate(_padded(data, begin, end), weight, strides, dilations, group)
        return (_accumulated(result, added, x.dtype, offset, label, axis=1),)


class ConvTranspose(OpRun):
    """A transposed convolution: spread the data over the strides, correlate with the flip."""

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float | None = None,
        auto_pad: str = "NOTSET",
        dilations: Sequence[int] | None = None,
        group: int = 1,
        kernel_shape: Sequence[int] | None = None,
        output_padding: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        if auto_pad != "NOTSET" or output_shape is not None:
            raise ValueError(
                f"{label!r} must give its padding by 'pads' and 'output_padding'; got auto_pad "
                f"{auto_pad!r} and output_shape {output_shape!r}."
            )
        weight = unpacked(weight, 0, x.shape[1])
        kernel = weight.shape[2:]
        rank = len(kernel)
        strides, dilations = _filled(strides, kernel), _filled(dilations, kernel)
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=1)
        spread = np.zeros(
            (
                *data.shape[:2],
                *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True)),
            ),
            data.dtype,
        )
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = data
        reach = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        pads = pads or [0] * 2 * rank
        extra = output_padding or [0] * rank
        begin = [r - p for r, p in zip(reach, pads[:rank], strict=True)]
        end = [r - p + e for r, p, e in zip(reach, pads[rank:], extra, strict=True)]
        # [Cin, Cout/g, k] with Cin in groups -> [Cout, Cin/g, k], flipped
        grouped = weight.reshape(group, -1, *weight.shape[1:]).swapaxes(1, 2)
        flipped = np.flip(grouped, tuple(range(3, 3 + rank)))
        kernels = flipped.reshape(-1, *flipped.shape[2:])
        ones = [1] * rank
        result = _correlate(_padded(spread, begin, end), kernels, ones, dilations, group)
        return (_accumulated(result, added, x.dtype, offset, label, axis=1),)


class Gemm(OpRun):
    """An integer ``x @ weight + bias``; the deploy format has no transposes and no factors."""

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        *,
        label: str,
        offset: float,
        alpha: float = 1.0,
        beta: float = 1.0,
        transA: int = 0,  # noqa: N803 - the operator's own name
        transB: int = 0,  # noqa: N803
    ) -> tuple[Array]:
        if (alpha, beta, transA) != (1.0, 1.0, 0):
            raise ValueError(
                f"An integer Gemm must have alpha = beta = 1 and transA = 0; {label!r} has "
                f"alpha {alpha}, beta {beta}, transA {transA}."
            )
        weight = unpacked(weight.T if transB else weight, 0, x.shape[-1])
        data, weight, added = _operands(x, weight, bias, offset, channel_axis=1)
        return (_accumulated(data @ weight, added, x.dtype, offset, label, axis=-1),)


class MatMul(OpRun):
    """An integer ``x @ weight``."""

    op_domain = _DOMAIN

    def _run(self, x: Array, weight: Array, *, label: str, offset: float) -> tuple[Array]:
        weight = unpacked(weight, 0, x.shape[-1])
        data, weight, _ = _operands(x, weight, None, offset, channel_axis=1)
        return (_accumulated(data @ weight, None, x.dtype, offset, label, axis=-1),)


class BatchNormalization(OpRun):
    """A batch norm that no layer could take in, with its own statistics.

    ``onnx.reference`` normalizes with those of the batch in the opsets that deploy files use.
    """

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        gamma: Array,
        beta: Array,
        mean: Array,
        var: Array,
        *,
        label: str,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
    ) -> tuple[Array]:
        if training_mode:
            raise ValueError(f"{label!r} must normalize with stored statistics; got training_mode.")
        shape = (-1, *[1] * (x.ndim - 2))
        factor = gamma / np.sqrt(var + x.dtype.type(epsilon))
        return ((x - mean.reshape(shape)) * factor.reshape(shape) + beta.reshape(shape),)


class MaxPool(OpRun):
    """The largest value of every window; no indices."""

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        kernel_shape: Sequence[int],
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        storage_order: int = 0,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        lowest = -np.inf if np.issubdtype(x.dtype, np.floating) else np.iinfo(x.dtype).min
        pool = _Pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        return (pool.windows(x, fill=lowest).max(axis=pool.axes),)


class AveragePool(OpRun):
    """The mean of every window, over its real elements or with the padding."""

    op_domain = _DOMAIN

    def _run(
        self,
        x: Array,
        *,
        label: str,
        kernel_shape: Sequence[int],
        auto_pad: str = "NOTSET",
        ceil_mode: int = 0,
        count_include_pad: int = 0,
        dilations: Sequence[int] | None = None,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
    ) -> tuple[Array]:
        pool = _Pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
        ones = np.ones((1, 1, *x.shape[2:]), x.dtype)
        if count_include_pad:
            ones = _padded(ones, pool.begin, pool.end, 1)
            counted = pool.windows(ones, padded=True)
        else:
            counted = pool.windows(ones)
        total = pool.windows(x).sum(axis=pool.axes, dtype=x.dtype)
        return ((total / counted.sum(axis=pool.axes)).astype(x.dtype),)


class BasicLSTMInplaceFillWindowCache(OpRun):
    """See ``_ascend_recurrent.lstm``."""

    op_domain = _DOMAIN

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        x, weight, recurrent, h, c, bias, _, _, param = inputs
        given = (x, weight, recurrent, h, c, bias, param)
        return _ascend_recurrent.lstm(*given, **attributes)  # type: ignore[arg-type]


class BasicGRUInplaceFillWindowCache(OpRun):
    """See ``_ascend_recurrent.gru``."""

    op_domain = _DOMAIN

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        x, weight, recurrent, h, bias, _, _, param = inputs
        given = (x, weight, recurrent, h, bias, param)
        return _ascend_recurrent.gru(*given, **attributes)  # type: ignore[arg-type]


_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_OPS = (
    *(AscendQuant, AscendDequant, AscendAntiQuant),
    *(Conv, ConvTranspose, Gemm, MatMul),
    *(BatchNormalization, MaxPool, AveragePool),
    *(BasicLSTMInplaceFillWindowCache, BasicGRUInplaceFillWindowCache),
)


class _Pool:
    """The windows of a pool; the last one may stick out where ``ceil_mode`` allows it."""

    def __init__(
        self,
        x: Array,
        kernel: Sequence[int],
        auto_pad: str,
        ceil_mode: int,
        dilations: Sequence[int] | None,
        pads: Sequence[int] | None,
        strides: Sequence[int] | None,
    ) -> None:
        self._dilations = _filled(dilations, kernel)
        self._strides = _filled(strides, kernel)
        self._spans = [d * (k - 1) + 1 for k, d in zip(kernel, self._dilations, strict=True)]
        size = x.shape[2:]
        self.begin, self.end = _padding(auto_pad, pads, size, self._spans, self._strides)
        self.axes = tuple(range(-len(kernel), 0))
        self._overhang = [0] * len(kernel)
        if ceil_mode:
            for axis, stride in enumerate(self._strides):
                padded = size[axis] + self.begin[axis] + self.end[axis]
                steps = math.ceil((padded - self._spans[axis]) / stride)
                # A window must start inside the data or the padding before it.
                if steps * stride >= size[axis] + self.begin[axis]:
                    steps -= 1
                self._overhang[axis] = max(0, steps * stride + self._spans[axis] - padded)

    def windows(self, x: Array, *, fill: float = 0, padded: bool = False) -> Array:
        """``x`` as ``[N, C, out..., kernel...]``."""
        begin = [0] * len(self.begin) if padded else self.begin
        end = [0] * len(self.end) if padded else self.end
        end = [e + o for e, o in zip(end, self._overhang, strict=True)]
        x = _padded(x, begin, end, fill)
        return _windows(x, self._spans, self._strides, self._dilations)


def _require(label: str, attribute: str, value: Any, known: Mapping[Any, Any]) -> None:
    if value not in known:
        raise ValueError(f"{attribute} of {label!r} must be one of {list(known)}; got {value!r}.")


def _filled(values: Sequence[int] | None, kernel: Sequence[int]) -> list[int]:
    return [1] * len(kernel) if values is None else list(values)


def _padding(
    auto_pad: str,
    pads: Sequence[int] | None,
    size: Sequence[int],
    spans: Sequence[int],
    strides: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Padding before and after each axis, by ONNX's rules for ``auto_pad``."""
    rank = len(size)
    if auto_pad == "NOTSET":
        pads = pads or [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    if auto_pad == "VALID":
        return [0] * rank, [0] * rank
    total = [
        max(0, (math.ceil(n / s) - 1) * s + span - n)
        for n, span, s in zip(size, spans, strides, strict=True)
    ]
    small, large = [t // 2 for t in total], [t - t // 2 for t in total]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def _padded(x: Array, begin: Sequence[int], end: Sequence[int], fill: float = 0) -> Array:
    """Pad the spatial axes; a negative amount cuts."""
    ends = tuple(zip(begin, end, strict=True))
    cuts = (slice(max(-b, 0), -e if e < 0 else None) for b, e in ends)
    x = x[(slice(None), slice(None), *cuts)]
    widths = [(max(b, 0), max(e, 0)) for b, e in ends]
    if not any(b or e for b, e in widths):
        return x
    sizes = x.shape[2:]
    around = [b + size + e for size, (b, e) in zip(sizes, widths, strict=True)]
    # Images last in memory, as in ``_correlate``.
    padded = np.moveaxis(np.full((x.shape[1], *around, x.shape[0]), fill, x.dtype), -1, 0)
    inside = (slice(b, b + size) for size, (b, _) in zip(sizes, widths, strict=True))
    padded[(slice(None), slice(None), *inside)] = x
    return padded


def _windows(
    x: Array, spans: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Array:
    axes = tuple(range(2, x.ndim))
    view: Array = sliding_window_view(x, tuple(spans), axes)
    steps = (slice(None, None, s) for s in (*strides, *dilations))
    return view[(slice(None), slice(None), *steps)]


def _correlate(
    x: Array,
    kernels: Array,
    strides: Sequence[int],
    dilations: Sequence[int],
    group: int,
) -> Array:
    """Correlate padded data with kernels ``[Cout, Cin/g, k...]``, a block of images at a time.

    Images are the last axis in memory, of the data that is copied and of the result: runs are long
    however small the images are, and the next layer finds its data in that order.
    """
    kernel = kernels.shape[2:]
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    images = np.moveaxis(x, 0, -1)
    flat = kernels.reshape(group, kernels.shape[0] // group, -1)
    # Every position of the kernel sees the data shifted; [c, k..., out..., n] are all of them.
    seen = (x.shape[1], *kernel, *out)
    block = max(1, _BLOCK_BYTES // max(1, math.prod(seen) * x.itemsize))
    parts = []
    for first in range(0, max(1, x.shape[0]), block):
        part = images[..., first : first + block]
        columns = np.empty((*seen, part.shape[-1]), x.dtype)
        for at in np.ndindex(*kernel):
            shifted = (
                slice(a * d, a * d + (n - 1) * s + 1, s)
                for a, n, s, d in zip(at, out, strides, dilations, strict=True)
            )
            columns[(slice(None), *at)] = part[(slice(None), *shifted)]
        product = flat @ columns.reshape(group, flat.shape[2], -1)
        parts.append(product.reshape(-1, *out, part.shape[-1]))
    result = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return np.moveaxis(result, -1, 0)


def _operands(
    x: Array, weight: Array, bias: Array | None, offset: float | None, *, channel_axis: int
) -> tuple[Array, Array, Array | None]:
    """Data, weight and bias in one type: real values as they are, integers around zero.

    A sum of integers is exact in floats, in any order, while no partial sum can leave the range in
    which the type holds every integer. That is 2**24 for float32, which is twice as fast, and 2**53
    for float64, which no layer reaches: ``max|q - offset| * sum|w| + |bias|`` bounds them all.
    """
    if offset is None:
        return x, weight, bias
    limits = np.iinfo(x.dtype)
    largest = max(abs(limits.min - offset), abs(limits.max - offset))
    others = tuple(axis for axis in range(weight.ndim) if axis != channel_axis)
    bound = largest * np.abs(weight, dtype=np.float64).sum(others).max(initial=0)
    if bias is not None:
        bound += np.abs(bias, dtype=np.float64).max(initial=0)
    kind = np.dtype(np.float32 if bound < _EXACT_IN_FLOAT32 else np.float64)
    added = None if bias is None else bias.astype(kind)
    return x.astype(kind) - kind.type(offset), weight.astype(kind), added


def _accumulated(
    result: Array,
    bias: Array | None,
    data_type: np.dtype[Any],
    offset: float | None,
    label: str,
    *,
    axis: int,
) -> Array:
    """Add the bias; make an accumulator integers again.

    The width of a device's accumulator for 16-bit data is not known; it is not bounded here.
    """
    if bias is not None:
        shape = [1] * result.ndim
        shape[axis] = bias.size
        result += bias.reshape(shape)
    if offset is None:
        return result
    if data_type == np.int16:
        return result.astype(np.int64)
    # In float32 it was bounded before.
    wide = result.dtype == np.float64 and result.size
    if wide and (result.min() < _INT32.min or result.max() > _INT32.max):
        raise ValueError(
            f"The accumulator of {label!r} must fit int32; it runs from {result.min():.0f} to "
            f"{result.max():.0f}."
        )
    return result.astype(np.int32)
