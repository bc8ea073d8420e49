"""Final quantization as explicit nodes of an exported graph; functions to read and add them.

Two operators carry everything an exporter needs: constants for scale and zero point, the grid, and
the key of the tensor. They have no gradient; training uses ``numerics.fake_quantize``. The order of
their arguments is known here only: read a node with ``as_fake_quantize``, ``as_dequantize`` or
``key_of``, and add one with ``make_fake_quantize`` or ``make_dequantize``.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from lightning_qat.numerics.arithmetic import along_channels
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid, QParams


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
    return integers.to(torch.float32) * along_channels(scale, integers.shape, axis)


@dequantize_node.register_fake
def _(integers: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, key: str) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


FAKE_QUANTIZE: Any = torch.ops.lightning_qat.fake_quantize.default
"""The target of every ``fake_quantize`` node."""

DEQUANTIZE: Any = torch.ops.lightning_qat.dequantize.default
"""The target of every ``dequantize`` node."""


class FakeQuantizeCall(NamedTuple):
    """The arguments of a ``fake_quantize`` node; tensors are nodes of the graph."""

    x: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    grid: IntegerGrid
    key: str

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the operator ``FAKE_QUANTIZE``, in its order."""
        return (self.x, self.scale, self.zero_point, self.grid.qmin, self.grid.qmax, self.key)


class DequantizeCall(NamedTuple):
    """The arguments of a ``dequantize`` node; tensors are nodes of the graph."""

    integers: fx.Node
    scale: fx.Node
    grid: IntegerGrid
    axis: int | None
    key: str

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of the operator ``DEQUANTIZE``, in its order."""
        return (self.integers, self.scale, self.grid.qmin, self.grid.qmax, self.axis, self.key)


def as_fake_quantize(node: object) -> FakeQuantizeCall | None:
    """Read the arguments of a ``fake_quantize`` node; ``None`` for anything else."""
    if not isinstance(node, fx.Node) or node.target is not FAKE_QUANTIZE:
        return None
    args: Any = node.args
    x, scale, zero_point, qmin, qmax, key = args
    return FakeQuantizeCall(x, scale, zero_point, IntegerGrid(qmin, qmax), key)


def as_dequantize(node: object) -> DequantizeCall | None:
    """Read the arguments of a ``dequantize`` node; ``None`` for anything else."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    args: Any = node.args
    integers, scale, qmin, qmax, axis, key = args
    return DequantizeCall(integers, scale, IntegerGrid(qmin, qmax), axis, key)


def key_of(node: object) -> str | None:
    """The key of the tensor that a node quantizes or dequantizes; ``None`` for any other node."""
    call = as_fake_quantize(node) or as_dequantize(node)
    return None if call is None else call.key


def layer_operands(node: fx.Node) -> tuple[FakeQuantizeCall, DequantizeCall] | None:
    """The quantized input and weight of a layer's call; ``None`` for any other node."""
    operands = [arg for arg in node.args[:3] if isinstance(arg, fx.Node)]
    if node.op != "call_function" or len(operands) < 2:
        return None
    source, weight = as_fake_quantize(operands[0]), as_dequantize(operands[1])
    return None if source is None or weight is None else (source, weight)


def layer_of_weight_key(key: str) -> str:
    """The layer that a weight belongs to, by its key; of a product written by hand its name.

    Example:
        >>> layer_of_weight_key("net.conv.weight"), layer_of_weight_key("net.matmul_0_weight")
        ('net.conv', 'net.matmul_0')
    """
    path, _, name = key.rpartition(".")
    product = name.partition("_weight")[0] if "_weight" in name else ""
    return f"{path}.{product}".strip(".")


def make_fake_quantize(graph: fx.Graph, x: fx.Node, qparams: QParams, key: str) -> fx.Node:
    """Add a whole ``fake_quantize`` node at the insertion point of a graph module's graph.

    Set the point with ``graph.inserting_before``: this adds several nodes, and under
    ``inserting_after`` fx puts them in reverse order.

    Scale and zero point become buffers of the graph module. In an ``ExportedProgram``, whose
    constants are inputs of the graph, use ``Constants.add`` and ``FakeQuantizeCall.args`` instead.

    Args:
        graph: A graph that a ``GraphModule`` owns.
        x: The node of the float tensor.
        qparams: Scale, zero point and grid, per tensor.
        key: The key of the quantized tensor.

    Returns:
        The node; its ``meta["val"]`` is that of ``x``.
    """
    scale = _add_buffer(graph, f"{key}_scale", qparams.scale)
    zero_point = _add_buffer(graph, f"{key}_zero_point", qparams.zero_point)
    call = FakeQuantizeCall(x, scale, zero_point, qparams.grid, key)
    node = graph.call_function(FAKE_QUANTIZE, call.args)
    if "val" in x.meta:
        node.meta["val"] = x.meta["val"]
    return node


def make_dequantize(graph: fx.Graph, integers: Tensor, qparams: QParams, key: str) -> fx.Node:
    """Add a whole ``dequantize`` node at the insertion point of a graph module's graph.

    Args:
        graph: A graph that a ``GraphModule`` owns; integers and scale become its buffers.
        integers: The symmetric weight's integers.
        qparams: Scale, grid and channel axis; the zero point is 0.
        key: The key of the quantized tensor.

    Returns:
        The node; its ``meta["val"]`` has the shape and dtype of the real weight, on device "meta".
    """
    stored = _add_buffer(graph, f"{key}_integers", integers)
    scale = _add_buffer(graph, f"{key}_scale", qparams.scale)
    call = DequantizeCall(stored, scale, qparams.grid, qparams.axis, key)
    node = graph.call_function(DEQUANTIZE, call.args)
    node.meta["val"] = torch.empty(integers.shape, device="meta")
    return node


def _add_buffer(graph: fx.Graph, name: str, value: Tensor) -> fx.Node:
    module = graph.owning_module
    assert module is not None, "The graph must belong to a GraphModule."
    wanted = unused = re.sub(r"\W", "_", name)
    number = 0
    while hasattr(module, unused):
        number += 1
        unused = f"{wanted}_{number}"
    module.register_buffer(unused, value)
    node: fx.Node = graph.get_attr(unused)
    node.meta["val"] = value
    return node
