"""Spell operators that LiteRT has in float only, or rounds twice, by integer ones.

==========================  ======================================================================
torch                       in the file
==========================  ======================================================================
average pools               DEPTHWISE_CONV_2D of equal weights, where input and output have grids
                            of their own; MUL at the border where padding is not counted
hardsigmoid                 ADD of 3 with relu6, MUL by a sixth
==========================  ======================================================================
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lightning_qat.quantized_model import QuantizedTensor
from lightning_qat_exporters import _tflite_averages as averages
from lightning_qat_exporters import _tflite_sigmoids as sigmoids
from lightning_qat_exporters._litert_grids import Annotated, kind

_ATEN = torch.ops.aten


def spell_in_integers(annotated: Annotated) -> dict[str, QuantizedTensor]:
    """Rewrite a graph in place.

    Returns:
        Every constant that was added, by the key of its ``dequantize`` node.
    """
    writer = _Writer(annotated)
    for node in list(annotated.graph.nodes):
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

    def __init__(self, annotated: Annotated) -> None:
        self.annotated, self.graph = annotated, annotated.graph
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
            weight = self._constant(
                averages.equal_weights(f"{node.name}.weight", channels, kernel)
            )
            mean = self._call(node, _ATEN.conv2d.default, source, weight, *options)
            if any(padding) and not counts:
                factors = averages.border_factors(
                    f"{node.name}.border", _size(source), kernel, stride, padding
                )
                mean = self._quantize(node, mean, grid)
                mean = self._call(node, _ATEN.mul.Tensor, mean, self._constant(factors))
            self._replace(node, mean)

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
        return self.graph.call_function(torch.ops.lightning_qat.dequantize.default, arguments)

    def _replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)


def _size(node: Any) -> tuple[int, ...]:
    """Height and width of a picture."""
    return tuple(int(n) for n in node.meta["val"].shape[-2:])


def _pair(value: Any) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


def _defaults(node: fx.Node, *defaults: Any) -> tuple[Any, ...]:
    return (*node.args, *defaults[len(node.args) :])
