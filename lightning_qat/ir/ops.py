"""Final quantization as explicit nodes of an exported graph.

Two operators carry everything an exporter needs: constants for scale and zero point, the grid, and
the name of the tensor. They have no gradient; training uses ``fake_quantization.fake_quantize``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_qat.numerics.arithmetic import along_axis
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid


@torch.library.custom_op("lightning_qat::fake_quantize", mutates_args=())
def fake_quantize_node(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, key: str
) -> Tensor:
    """``fake_quantize`` as one node of an exported graph, without a gradient."""
    return fake_quantize(x, scale, zero_point, IntegerGrid(qmin, qmax)).clone()


@fake_quantize_node.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, key: str) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_qat::dequantize", mutates_args=())
def dequantize_node(
    integers: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, key: str
) -> Tensor:
    """A symmetric integer weight's real value as one node of an exported graph."""
    return integers.to(torch.float32) * along_axis(scale, integers.dim(), axis)


@dequantize_node.register_fake
def _(integers: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, key: str) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


class FakeQuantizeCall(NamedTuple):
    """The arguments of a ``fake_quantize`` node; tensors are nodes of the graph."""

    x: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    grid: IntegerGrid
    key: str


class DequantizeCall(NamedTuple):
    """The arguments of a ``dequantize`` node; tensors are nodes of the graph."""

    integers: fx.Node
    scale: fx.Node
    grid: IntegerGrid
    axis: int | None
    key: str


def as_fake_quantize(node: fx.Node) -> FakeQuantizeCall | None:
    """What a ``fake_quantize`` node says; ``None`` for any other node."""
    if node.target is not fake_quantize_node._opoverload:
        return None
    args: Any = node.args
    x, scale, zero_point, qmin, qmax, key = args
    return FakeQuantizeCall(x, scale, zero_point, IntegerGrid(qmin, qmax), key)


def as_dequantize(node: fx.Node) -> DequantizeCall | None:
    """What a ``dequantize`` node says; ``None`` for any other node."""
    if node.target is not dequantize_node._opoverload:
        return None
    args: Any = node.args
    integers, scale, qmin, qmax, axis, key = args
    return DequantizeCall(integers, scale, IntegerGrid(qmin, qmax), axis, key)


def new_dequantize(graph: fx.Graph, call: DequantizeCall) -> fx.Node:
    """Add a ``dequantize`` node at the graph's insertion point."""
    grid = call.grid
    return graph.call_function(
        dequantize_node._opoverload,
        (call.integers, call.scale, grid.qmin, grid.qmax, call.axis, call.key),
    )
