"""What a QDQ graph quantizes, matched once: which layers can run on integers on an Ascend device.

Matches structure, never names: ``QuantizeLinear -> [Clip] -> DequantizeLinear`` before a
convolution or a matrix product whose weight is ``DequantizeLinear`` of constant integers. Types,
ranges and packing are those of Ascend's operators. The model stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lightning_qat.export.protocol import CannotExpress, Unsupported
from lightning_qat.ir.operators import LAYER_TYPES, RECURRENT_TYPES
from lightning_qat_exporters.cann.qdq_graph.activations import (
    PairGroup,
    named_activations,
    quantize_before,
    read_pair,
)
from lightning_qat_exporters.cann.qdq_graph.constants import FOLLOWED, is_constant
from lightning_qat_exporters.cann.qdq_graph.layers import LayerParts, read_layer
from lightning_qat_exporters.cann.qdq_graph.names import label
from lightning_qat_exporters.cann.qdq_graph.quantized_constants import (
    check_quantized_constant,
    constant_dequantize,
)
from lightning_qat_exporters.cann.qdq_graph.recurrent import read_recurrent
from lightning_qat_exporters.cann.qdq_graph.types import (
    DEVICE_REMEDY,
    IntegerLayer,
    IntegerRecurrent,
    QuantizedActivation,
    QuantizedGraph,
    UnusableValues,
)
from lightning_qat_exporters.onnx_files.graph_writer import Names


def find_quantized(model: ir.Model, *, recurrent: bool = False) -> QuantizedGraph:
    """Find the quantized tensors and layers of a QDQ model.

    Pairs that read the same tensor with the same scale, zero point, type and range are one
    ``QuantizedActivation``. Layers with equal node names get ``name``, ``name_1``, and so on.

    Args:
        model: A model as ``with_plain_constants`` or ``normalize`` returns it. Subgraphs are not
            searched.
        recurrent: Find LSTM and GRU that have a device node, too.

    Returns:
        The findings. Nothing is raised: what cannot be expressed is listed in ``problems``.
    """
    groups, group_of, problems = _find_pairs(model.graph)
    parts, left_float, more = _find_layers(model.graph, group_of)
    names = Names()
    name_of = {node: names.take(label(node)) for node in parts}
    first_layer: dict[PairGroup, str] = {}
    for node, part in parts.items():
        first_layer.setdefault(part.input, name_of[node])
    activations = named_activations(groups, first_layer)
    layers = tuple(
        _finished(node, name_of[node], part, activations[part.input])
        for node, part in parts.items()
    )
    found: tuple[IntegerRecurrent, ...] = ()
    if recurrent:
        activation_of = {node: activations[group] for node, group in group_of.items()}
        found, left = _find_recurrent(model.graph, activation_of)
        judged = {layer.name for layer in found} | {remark.layer for remark in left}
        left_float = [*(r for r in left_float if r.layer not in judged), *left]
    return QuantizedGraph(
        model=model,
        activations=tuple(activations.values()),
        layers=layers,
        recurrent=found,
        left_float=tuple(left_float),
        problems=(*problems, *more),
    )


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


def integer_outputs(found: QuantizedGraph) -> tuple[str, ...]:
    """Graph outputs that are the integers of a quantized tensor."""
    return tuple(
        value.name or ""
        for activation in found.activations
        for node in activation.quantizes
        for value in (node.outputs[0], *(n.outputs[0] for n in node.outputs[0].consumers()))
        if value.is_graph_output() and value.producer() not in activation.dequantizes
    )


def _find_pairs(
    graph: ir.Graph,
) -> tuple[list[PairGroup], dict[ir.Node, PairGroup], list[Unsupported]]:
    """All groups, the group of every activation's DequantizeLinear, and wrong parameters."""
    problems: list[Unsupported] = []
    groups: dict[tuple[Any, ...], PairGroup] = {}
    group_of: dict[ir.Node, PairGroup] = {}
    for node in graph:
        try:
            if node.op_type == "QuantizeLinear" and not is_constant(node.inputs[0]):
                pair = read_pair(node)
                group = groups.setdefault(pair.key, pair)
                if group is not pair:
                    group.quantizes += pair.quantizes
                    group.dequantizes += pair.dequantizes
                group_of.update(dict.fromkeys(pair.dequantizes, group))
            elif node.op_type == "DequantizeLinear":
                if constant_dequantize(node.outputs[0]) is node:
                    check_quantized_constant(node)
                elif quantize_before(node) is None:
                    raise CannotExpress("no QuantizeLinear makes the integers it reads")
        except CannotExpress as error:
            assert node.inputs[0] is not None  # that of these two operators is not optional
            reason = f"{error.reason} (tensor {node.inputs[0].name!r})"
            problems.append(Unsupported(label(node), reason, error.remedy))
    return list(groups.values()), group_of, problems


def _find_layers(
    graph: ir.Graph, group_of: Mapping[ir.Node, PairGroup]
) -> tuple[dict[ir.Node, LayerParts], list[Unsupported], list[Unsupported]]:
    """Integer layers, compute nodes that are left float, and layers with unusable values."""
    parts: dict[ir.Node, LayerParts] = {}
    biases: set[ir.Node | None] = set()  # the Adds that bring a bias to its layer
    left_float: list[Unsupported] = []
    problems: list[Unsupported] = []
    for node in graph:
        if node in biases:
            continue
        if node.op_type not in LAYER_TYPES or node.domain:
            hands_on = node.op_type in (*FOLLOWED, "Reshape", "DequantizeLinear")
            if not hands_on and any(constant_dequantize(v) is not None for v in node.inputs):
                remedy = DEVICE_REMEDY if node.op_type in RECURRENT_TYPES else ""
                reason = f"{node.op_type} keeps real weights"
                left_float.append(Unsupported(label(node), reason, remedy))
            continue
        try:
            parts[node] = read_layer(node, group_of)
            biases.add(parts[node].bias.add)
        except UnusableValues as error:
            problems.append(error.at(label(node)))
        except CannotExpress as error:
            left_float.append(error.at(label(node)))
    return parts, left_float, problems


def _finished(
    node: ir.Node, name: str, parts: LayerParts, activation: QuantizedActivation
) -> IntegerLayer:
    return IntegerLayer(
        name=name,
        node=node,
        activation=activation,
        weight=parts.weight.integers.astype(np.int8, copy=False),
        scale_w=parts.weight.scale,
        channel_axis=parts.weight.channel_axis,
        bias=parts.bias.real,
        add=parts.bias.add,
        real=parts.real,
        wts_type=parts.weight.wts_type,
    )


def _find_recurrent(
    graph: ir.Graph, activation_of: Mapping[ir.Node, QuantizedActivation]
) -> tuple[tuple[IntegerRecurrent, ...], tuple[Unsupported, ...]]:
    """LSTM and GRU that have a device node, and why the others have none."""
    layers, left = [], []
    for node in graph:
        if node.op_type in RECURRENT_TYPES and not node.domain:
            try:
                layers.append(read_recurrent(node, activation_of))
            except CannotExpress as error:
                reason = f"it has no device node: {error.reason}"
                left.append(Unsupported(label(node), reason, error.remedy))
    return tuple(layers), tuple(left)


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a tensor, also cast or transposed."""
    waiting = [iter(value.consumers())]
    while waiting:
        node = next(waiting[-1], None)
        if node is None:
            waiting.pop()
        elif node.op_type in FOLLOWED:
            waiting.append(iter(node.outputs[0].consumers()))
        else:
            yield node
