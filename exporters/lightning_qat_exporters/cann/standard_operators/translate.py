"""Rewrite a deploy model as standard operators that ONNX Runtime runs; exact on integers."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from lightning_qat.export.protocol import CannotExpress
from lightning_qat.ir.operators import LAYER_TYPES
from lightning_qat_exporters.cann.standard_operators.channels import input_channels
from lightning_qat_exporters.cann.standard_operators.layers import channel_axis, write_layer
from lightning_qat_exporters.cann.standard_operators.node_writer import NodeWriter
from lightning_qat_exporters.cann.standard_operators.quantize_nodes import (
    Centered,
    write_antiquant,
    write_dequant,
    write_quant,
)
from lightning_qat_exporters.cann.standard_operators.recurrent import RECURRENT, write_recurrent
from lightning_qat_exporters.onnx_files.graph_writer import GraphWriter

ASCEND = ("AscendQuant", "AscendDequant", "AscendAntiQuant")


class NoStandardForm(ValueError):
    """Nodes of a deploy model have no form in standard operators.

    Args:
        problems: Each node with its reason.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        super().__init__(
            "These nodes have no form in standard operators:"
            + "".join(f"\n  {problem}" for problem in problems)
        )


def as_standard_operators(model: ir.Model) -> dict[str, str]:
    """Rewrite a deploy model in place.

    Products of integers are exact, scalings are in float32; the rest of the model is left as it is.

    Args:
        model: The deploy model.

    Returns:
        What is wrong where one of the added outputs is not 0, by the output's name: data that
        cannot be quantized, accumulators outside int32.

    Raises:
        NoStandardForm: Some nodes have none; all are named, each with the reason.
    """
    graph = GraphWriter(model.graph)
    walk = _Walk(graph, input_channels(model))
    for node in tuple(model.graph):
        walk.rewrite(node)
    problems = [
        *walk.problems,
        *(
            f"{node.name!r} ({node.op_type}): it must not be inside a branch or loop"
            for node in model.graph.all_nodes()
            if node.graph is not model.graph and node.op_type in (*ASCEND, *RECURRENT)
        ),
    ]
    if problems:
        raise NoStandardForm(problems)
    graph.register_constants()
    common.RemoveUnusedNodesPass()(model)
    common.NameFixPass()(model)
    return walk.alarms


class _Walk:
    """Rewrites nodes in order, and remembers what later ones must know of earlier ones."""

    def __init__(self, graph: GraphWriter, channels: dict[ir.Node, int]) -> None:
        self.alarms: dict[str, str] = {}
        self.problems: list[str] = []
        self._graph, self._channels = graph, channels
        self._integers: dict[ir.Value, Centered] = {}
        self._accumulators: dict[ir.Value, int] = {}
        self._failed: set[ir.Value] = set()

    def rewrite(self, node: ir.Node) -> None:
        data = node.inputs[0] if node.inputs else None
        layer = node.op_type in LAYER_TYPES
        if data is None or (data in self._failed and not layer):
            return
        write = NodeWriter(self._graph, node, self.alarms)
        try:
            if data in self._failed:
                self._failed.update(node.outputs)
            elif layer and data in self._integers:
                axis = channel_axis(node)
                total = write_layer(write, node, self._integers[data], self._channels.get(node))
                self._accumulators[total] = axis
                write.replace(total)
            else:
                self._rewrite_other(write, node, data)
        except CannotExpress as error:
            self.problems.append(f"{write.label!r} ({node.op_type}): {error}")
            self._failed.update(node.outputs)

    def _rewrite_other(self, write: NodeWriter, node: ir.Node, data: ir.Value) -> None:
        if node.op_type == "AscendQuant":
            stored, centered = write_quant(write, node)
            self._integers[stored] = centered
            write.replace(stored)
        elif node.op_type == "AscendAntiQuant":
            write.replace(write_antiquant(write, node))
        elif node.op_type == "AscendDequant":
            write.replace(write_dequant(write, node, self._accumulators.get(data)))
        elif node.op_type in RECURRENT:
            write.replace(*write_recurrent(write, node, self._channels.get(node)))
        elif node.op_type in LAYER_TYPES and _is_int8(node.inputs[1]):
            raise CannotExpress("a layer with an int8 weight must read an AscendQuant")
        elif node.domain == "" and not onnx.defs.has(node.op_type):
            raise CannotExpress("ONNX has no operator of that name")


def _is_int8(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.INT8
