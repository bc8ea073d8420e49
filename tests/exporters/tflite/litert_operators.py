"""What every operator of a TFLite file should have computed from what it was given.

A file is run with all its tensors kept. Each operator is then computed again by its definition in
LiteRT's quantization specification: the real values of the tensors it read, the function in double
precision, one rounding to the grid of the tensor it wrote. Nothing that writes files takes part:
layouts, options and numbers are read from the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat_exporters.tflite.run import RUNTIMES, interpreter

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator of a file after a run.

    Args:
        kind: LiteRT's name of it.
        name: Of the tensor it wrote first.
        steps: How far each element is from the definition, in steps of the tensor's grid, or in
            1/255 of its largest value where it is float.
    """

    kind: str
    name: str
    steps: Array


def operators_of(content: bytes, kernels: str, samples: Sequence[Array]) -> list[Operator]:
    """Run a file and compare each of its operators with the definition.

    Args:
        content: A file with one input.
        kernels: A name in LiteRT's ``OpResolverType``.
        samples: Inputs in the file's layout, one per run.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(content, 0)
    graph, names = model.subgraphs[0], vars(schema.BuiltinOperator).items()
    int_repr = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in model.operatorCodes]
    kinds = [next(name for name, value in names if value == code) for code in int_repr]
    runner = interpreter(content, kernels, experimental_preserve_all_tensors=True)
    unfusable: list[list[Array]] = [[] for _ in graph.operators]
    for sample in samples:
        runner.set_tensor(graph.inputs[0], sample)
        runner.invoke()
        for op, found in zip(graph.operators, unfusable, strict=True):
            read = [_values(model, graph.tensors[i], runner, i) for i in op.inputs if i >= 0]
            expected = FORMULAS[kinds[op.opcodeIndex]](op.builtinOptions, *read)
            written = graph.tensors[op.outputs[0]]
            found.append(_steps(written, runner.get_tensor(op.outputs[0]), expected))
    return [
        Operator(
            kinds[op.opcodeIndex] + _kind_of_average(model, op),
            graph.tensors[op.outputs[0]].name.decode(),
            np.stack(steps),
        )
        for op, steps in zip(graph.operators, unfusable, strict=True)
    ]


def _kind_of_average(model: Any, op: Any) -> str:
    """What tells an average, or its correction at the border, from a layer of its kind."""
    if len(op.inputs) < 2:
        return ""
    stored = model.buffers[model.subgraphs[0].tensors[op.inputs[1]].buffer].data
    if stored is None or not len(stored):
        return ""
    kind = type(op.builtinOptions).__name__
    if kind == "DepthwiseConv2DOptionsT" and len(set(bytes(stored))) == 1:
        return " of equal weights"
    return " by a constant" if kind == "MulOptionsT" else ""


AVERAGES = ("MEAN", "AVERAGE_POOL_2D", "DEPTHWISE_CONV_2D of equal weights", "MUL by a constant")
"""Operators that LiteRT's own kernels often round one step down: their results are often ties."""


def assert_as_defined(content: bytes, samples: Tensor) -> None:
    """Every operator is at most a step from its definition, with each set of kernels.

    XNNPACK rounds once, as training does, and is off by none but ties. LiteRT's own kernels round
    an accumulator twice, which shows in few elements, and averages downwards, which shows in many.

    Args:
        content: A file that takes pictures in LiteRT's layout.
        samples: Pictures in torch's layout.
    """
    pictures = [x.numpy() for x in samples.permute(0, 2, 3, 1).contiguous().split(1)]
    for name, kernels in RUNTIMES.items():
        for operator in operators_of(content, kernels, pictures):
            where = f"{operator.kind} {operator.name} with {name}"
            assert operator.steps.max() <= 1, where
            if kernels == "AUTO" or operator.kind not in AVERAGES:
                assert operator.steps.mean() <= 0.03, where


def _values(model: Any, tensor: Any, runner: Any, index: int) -> Tensor:
    """Real values, in double precision; indices and shapes as they are."""
    stored = model.buffers[tensor.buffer].data
    if stored is None or not len(stored):
        array = runner.get_tensor(index)
    else:
        # A constant from the file: kernels may repack theirs.
        dtype = {0: "f4", 2: "i4", 4: "i8", 7: "i2", 9: "i1"}[tensor.type]
        array = np.frombuffer(bytes(stored), dtype).reshape(tensor.shape)
    grid = tensor.quantization
    if grid is None or grid.scale is None or not len(grid.scale):
        return torch.tensor(array).double() if array.dtype == np.float32 else torch.tensor(array)
    shape = [1] * array.ndim
    if len(grid.scale) > 1:
        shape[grid.quantizedDimension] = -1
    scale = torch.tensor(np.asarray(grid.scale, np.float64)).reshape(shape)
    zero_point = torch.tensor(np.asarray(grid.zeroPoint, np.float64)).reshape(shape)
    return scale * (torch.tensor(array).double() - zero_point)


def _steps(tensor: Any, found: Array, expected: Tensor) -> Array:
    grid = tensor.quantization
    if grid is None or grid.scale is None or not len(grid.scale):
        real: Array = np.abs(found - expected.numpy()) / max(float(expected.abs().max()), 1e-6)
        return real * 255
    limits = np.iinfo(found.dtype)
    steps = np.rint(expected.numpy() / np.float64(grid.scale[0])) + grid.zeroPoint[0]
    whole: Array = np.abs(np.clip(steps, limits.min, limits.max) - found.astype(np.float64))
    assert whole.shape == found.shape
    return whole


# Formulas. Pictures are (batch, height, width, channels) and turned to torch's order and back.


def _turned(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


def _back(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _activated(options: Any, x: Tensor) -> Tensor:
    bounds = {0: (-math.inf, math.inf), 1: (0, math.inf), 2: (-1, 1), 3: (0, 6)}
    low, high = bounds[options.fusedActivationFunction]
    return x.clamp(low, high)


def _padded(
    x: Tensor, options: Any, kernel: Sequence[int], dilation: Sequence[int], fill: float = 0.0
) -> Tensor:
    """Padding SAME, the larger half behind; VALID adds nothing."""
    amounts: list[int] = []
    strides = _strides(options)[-len(kernel) :]
    for size, k, s, d in zip(x.shape[2:], kernel, strides, dilation, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        amounts = [total // 2, total - total // 2, *amounts]
    return x if options.padding == 1 else F.pad(x, amounts, value=fill)


def _strides(options: Any) -> tuple[int, ...]:
    return getattr(options, "strideD", 1), options.strideH, options.strideW


def _conv_2d(options: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, x = weight.permute(0, 3, 1, 2), _turned(x)
    dilation = options.dilationHFactor, options.dilationWFactor
    x = _padded(x, options, weight.shape[2:], dilation)
    groups = x.shape[1] // weight.shape[1]
    found = F.conv2d(x, weight, bias, _strides(options)[1:], 0, dilation, groups)
    return _activated(options, _back(found))


def _depthwise_conv_2d(options: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    weight, x = weight.permute(3, 0, 1, 2), _turned(x)
    dilation = options.dilationHFactor, options.dilationWFactor
    x = _padded(x, options, weight.shape[2:], dilation)
    found = F.conv2d(x, weight, bias, _strides(options)[1:], 0, dilation, x.shape[1])
    return _activated(options, _back(found))


def _transpose_conv(
    options: Any, shape: Tensor, weight: Tensor, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    assert options.padding == 1
    strides = _strides(options)[1:]
    found = F.conv_transpose2d(_turned(x), weight.permute(3, 0, 1, 2), bias, strides)
    # What lies behind the last window holds the bias only.
    _, height, width, _ = shape.tolist()
    whole = torch.zeros(1, found.shape[1], height, width, dtype=found.dtype)
    whole += 0 if bias is None else bias.reshape(1, -1, 1, 1)
    whole[:, :, : found.shape[2], : found.shape[3]] = found
    return _activated(options, _back(whole))


def _conv_3d(options: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight, x = weight.permute(4, 3, 0, 1, 2), _turned(x)
    x = _padded(x, options, weight.shape[2:], (1, 1, 1))
    return _activated(options, _back(F.conv3d(x, weight, bias, _strides(options))))


def _fully_connected(options: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x if options.keepNumDims else x.reshape(-1, weight.shape[1])
    return _activated(options, F.linear(x, weight, bias))


def _average_pool_2d(options: Any, x: Tensor) -> Tensor:
    kernel = options.filterHeight, options.filterWidth
    # Padding is not counted.
    ones = _padded(torch.ones_like(_turned(x)), options, kernel, (1, 1))
    sums = _padded(_turned(x), options, kernel, (1, 1))
    sums, ones = (F.avg_pool2d(v, kernel, _strides(options)[1:]) for v in (sums, ones))
    return _activated(options, _back(sums / ones))


def _max_pool_2d(options: Any, x: Tensor) -> Tensor:
    kernel = options.filterHeight, options.filterWidth
    padded = _padded(_turned(x), options, kernel, (1, 1), -math.inf)
    return _activated(options, _back(F.max_pool2d(padded, kernel, _strides(options)[1:])))


def _mean(options: Any, x: Tensor, axes: Tensor) -> Tensor:
    return x.mean(axes.flatten().tolist(), bool(options.keepDims))


def _pad(_: Any, x: Tensor, amounts: Tensor, fill: Tensor | None = None) -> Tensor:
    flat = [int(n) for pair in reversed(amounts.tolist()) for n in pair]
    return F.pad(x, flat, value=0.0 if fill is None else float(fill))


def _nearest(options: Any, x: Tensor, size: Tensor) -> Tensor:
    assert not options.alignCorners
    return _back(F.interpolate(_turned(x), size.tolist()))


def _joined(options: Any, *values: Tensor) -> Tensor:
    return _activated(options, torch.cat(values, options.axis))


FORMULAS: Mapping[str, Callable[..., Tensor]] = {
    "QUANTIZE": lambda _, x: x,
    "DEQUANTIZE": lambda _, x: x,
    "CONV_2D": _conv_2d,
    "DEPTHWISE_CONV_2D": _depthwise_conv_2d,
    "TRANSPOSE_CONV": _transpose_conv,
    "CONV_3D": _conv_3d,
    "FULLY_CONNECTED": _fully_connected,
    "ADD": lambda options, x, y: _activated(options, x + y),
    "SUB": lambda options, x, y: _activated(options, x - y),
    "MUL": lambda options, x, y: _activated(options, x * y),
    "MEAN": _mean,
    "AVERAGE_POOL_2D": _average_pool_2d,
    "MAX_POOL_2D": _max_pool_2d,
    "HARD_SWISH": lambda _, x: x * (x + 3).clamp(0, 6) / 6,
    "CONCATENATION": _joined,
    "PAD": _pad,
    "PADV2": _pad,
    "TRANSPOSE": lambda _, x, order: x.permute(order.tolist()),
    "RESHAPE": lambda _, x, shape: x.reshape(shape.tolist()),
    "RESIZE_NEAREST_NEIGHBOR": _nearest,
}
"""LiteRT's name of an operator to what it computes: its options and real values in, reals out."""
