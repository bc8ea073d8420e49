"""Spell operators that LiteRT has in float only, or rounds twice, by integer ones.

==========================  ======================================================================
torch                       in the file
==========================  ======================================================================
average pools               DEPTHWISE_CONV_2D of equal weights, where input and output have grids
                            of their own; MUL at the border where padding is not counted
hardsigmoid                 ADD of 3 with relu6, MUL by a sixth
repeat, tile                CONCATENATION: litert-torch repeats pictures along another axis
transposed convolutions     TRANSPOSE_CONV, CONV_3D_TRANSPOSE, and a SLICE where torch cuts padding
==========================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from lightning_qat.ir.quantized_model import QuantizedTensor
from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose import average_pool as averages
from lightning_qat_exporters.tflite.decompose import hardsigmoid as sigmoids
from lightning_qat_exporters.tflite.decompose.conv_transpose import dense, dense_scale, size_and_cut
from lightning_qat_exporters.tflite.litert.requantize import Annotated, kind

_ATEN = torch.ops.aten
_DEQUANTIZE = torch.ops.lightning_qat.dequantize.default
_TRANSPOSE_CONV = torch.ops.lightning_qat_litert.transpose_conv.default
_TRANSPOSED = (_ATEN.conv_transpose1d, _ATEN.conv_transpose2d, _ATEN.conv_transpose3d)


def spell_in_integers(
    annotated: Annotated, tensors: Mapping[str, QuantizedTensor]
) -> dict[str, QuantizedTensor]:
    """Rewrite a graph in place.

    Args:
        annotated: The graph with its grids.
        tensors: The model's, by key.

    Returns:
        Every constant that was added, by the key of its ``dequantize`` node.
    """
    writer = _Writer(annotated, tensors)
    for node in list(annotated.graph.nodes):
        if kind(node) in _TRANSPOSED:
            writer.transposed(node)
            continue
        if kind(node) in (_ATEN.repeat, _ATEN.tile):
            writer.repeated(node)
            continue
        source, written = annotated.source(node), annotated.written(node)
        if source is None or written is None or written.dtype is not torch.int8:
            continue
        if kind(node) is _ATEN.hardsigmoid:
            writer.hardsigmoid(node)
        elif kind(node) is _ATEN.avg_pool2d and source != written:
            _, kernel, stride, padding, ceil, counts, divisor = _defaults(
                node, None, None, [], 0, False, True, None
            )
            if not ceil and divisor is None:
                kernel = _pair(kernel)
                writer.average(node, kernel, _pair(stride) or kernel, _pair(padding), counts)
        elif kind(node) is _ATEN.adaptive_avg_pool2d and source != written:
            before, after = _size(node.args[0]), _size(node)
            if after != (1, 1) and all(b % a == 0 for b, a in zip(before, after, strict=True)):
                kernel = [b // a for b, a in zip(before, after, strict=True)]
                writer.average(node, kernel, kernel, [0, 0], counts=True)
    return writer.constants


class _Writer:
    """Puts operators in the place of others."""

    def __init__(self, annotated: Annotated, tensors: Mapping[str, QuantizedTensor]) -> None:
        self.annotated, self.graph, self.tensors = annotated, annotated.graph, tensors
        self.constants: dict[str, QuantizedTensor] = {}

    def hardsigmoid(self, node: fx.Node) -> None:
        grid = self.annotated.written(node)
        assert grid is not None
        with self.graph.inserting_before(node):
            three = self._constant(sigmoids.three(f"{node.name}.three"))
            sixth = self._constant(sigmoids.sixth(f"{node.name}.sixth"))
            moved = self._call(node, _ATEN.add.Tensor, node.args[0], three)
            moved = self._call(node, _ATEN.hardtanh.default, moved, 0.0, 6.0)
            coarse = grid._replace(scale=float(torch.tensor(grid.scale * sigmoids.TIMES)))
            moved = self._quantize(node, moved, coarse)
            self._replace(node, self._call(node, _ATEN.mul.Tensor, moved, sixth))

    def average(
        self, node: fx.Node, kernel: list[int], stride: list[int], padding: list[int], counts: bool
    ) -> None:
        source: Any = node.args[0]
        grid, channels = self.annotated.written(node), int(source.meta["val"].shape[-3])
        assert grid is not None
        options = (None, stride, padding, [1, 1], channels)
        with self.graph.inserting_before(node):
            weight = self._constant(averages.equal_weights(f"{node.name}.weight", channels, kernel))
            mean = self._call(node, _ATEN.conv2d.default, source, weight, *options)
            if any(padding) and not counts:
                factors = averages.border_factors(
                    f"{node.name}.border", _size(source), kernel, stride, padding
                )
                mean = self._quantize(node, mean, grid)
                mean = self._call(node, _ATEN.mul.Tensor, mean, self._constant(factors))
            self._replace(node, mean)

    def repeated(self, node: fx.Node) -> None:
        x: Any = node.args[0]
        times: Any = node.args[1]
        size = x.meta["val"].shape
        times = [1] * (len(size) - len(times)) + list(times)
        with self.graph.inserting_before(node):
            for _ in range(len(times) - len(size)):
                x = self._call(node, _ATEN.unsqueeze.default, x, 0)
            for axis, count in enumerate(times):
                if count != 1:
                    x = self._call(node, _ATEN.cat.default, [x] * count, axis)
            self._replace(node, x)

    def transposed(self, node: fx.Node) -> None:
        """A layer with integer weights; one in float is left to litert-torch."""
        x, weight, bias, *options = _defaults(node, None, None, None, 1, 0, 0, 1, 1)
        if weight.target is not _DEQUANTIZE:
            return
        tensor, grid = self.tensors[weight.args[5]], self.annotated.written(node)
        assert tensor.integers is not None
        axes = tensor.integers.dim() - 2
        groups = options.pop(3)
        stride, padding, extra, dilation = (_each(value, axes) for value in options)
        integers = dense(tensor.integers, groups, dilation)
        size = tuple(int(n) for n in x.meta["val"].shape[2:])
        whole, starts, ends = size_and_cut(size, integers.shape[2:], stride, padding, extra)
        with self.graph.inserting_before(node):
            if axes == 1:
                # A picture of height 1.
                x, integers = self._call(node, _ATEN.unsqueeze.default, x, 2), integers.unsqueeze(2)
                stride, whole, starts, ends = [1, *stride], [1, *whole], [0, *starts], [1, *ends]
            rank = integers.dim()
            y = self._call(node, _ATEN.permute.default, x, [0, *range(2, rank), 1])
            turned = self._turned(f"{node.name}.weight", tensor.qparams, integers, groups)
            inputs, outputs = integers.shape[:2]
            if rank == 5:
                zeros = self._zeros(f"{node.name}_zeros", inputs)
                y = self._call(node, _TRANSPOSE_CONV, y, turned, zeros, stride, whole)
                y = y if bias is None else self._call(node, _ATEN.add.Tensor, y, bias)
            else:
                bias = self._zeros(f"{node.name}_bias", outputs) if bias is None else bias
                y = self._call(node, _TRANSPOSE_CONV, y, turned, bias, stride, whole)
                # Before what cuts and turns the result, so that the kernel rounds.
                y = y if grid is None else self._quantize(node, y, grid)
            for axis, n, start, end in zip(range(1, rank), whole, starts, ends, strict=False):
                if (start, end) != (0, n):
                    y = self._call(node, _ATEN.slice.Tensor, y, axis, start, end)
            y = self._call(node, _ATEN.permute.default, y, [0, rank - 1, *range(1, rank - 1)])
            self._replace(node, self._call(node, _ATEN.squeeze.dim, y, 2) if axes == 1 else y)

    def _turned(self, key: str, qparams: QParams, integers: torch.Tensor, groups: int) -> fx.Node:
        """A dense weight, its axes as LiteRT has them."""
        order = (1, 2, 3, 0) if integers.dim() == 4 else (2, 3, 4, 1, 0)
        scale = dense_scale(qparams, groups)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        axis = None if qparams.axis is None else order.index(1)
        of_file = QParams(scale, zero_point, qparams.grid, axis)
        integers = integers.permute(order).contiguous()
        return self._constant(QuantizedTensor(key, "weight", of_file, integers))

    def _zeros(self, name: str, count: int) -> fx.Node:
        module: Any = self.graph.owning_module
        module.register_buffer(name, torch.zeros(count))
        return self.graph.get_attr(name)

    def _call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        new = self.graph.call_function(target, args)
        new.meta["val"] = like.meta["val"]
        return new

    def _quantize(self, like: fx.Node, x: fx.Node, grid: Any) -> fx.Node:
        new = self._call(like, torch.ops.lightning_qat.fake_quantize.default, x)
        self.annotated.grids[new] = grid
        return new

    def _constant(self, tensor: QuantizedTensor) -> fx.Node:
        self.constants[tensor.key] = tensor
        arguments = (None, None, None, None, None, tensor.key)
        return self.graph.call_function(_DEQUANTIZE, arguments)

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def _size(node: Any) -> tuple[int, ...]:
    """Height and width of a picture."""
    return tuple(int(n) for n in node.meta["val"].shape[-2:])


def _pair(value: Any) -> list[int]:
    return _each(value, 2)


def _each(value: Any, axes: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _defaults(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    return (*node.args, *defaults[len(node.args) :])
