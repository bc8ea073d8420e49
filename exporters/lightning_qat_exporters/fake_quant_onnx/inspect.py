"""What an ONNX file quantizes by QuantizeLinear and DequantizeLinear, and what it leaves float."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from lightning_qat.export.files.inspection import InspectedLayer, InspectedTensor, Inspection
from lightning_qat.ir.operators import OPERATORS
from lightning_qat_exporters.onnx_files.foreign_quantizers import foreign_quantization
from lightning_qat_exporters.onnx_files.graph_facts import PRODUCTS, GraphFacts, name_of
from lightning_qat_exporters.onnx_files.nested import all_nodes
from lightning_qat_exporters.qdq.translate import keys_of

_JOINS = {
    name
    for operator in OPERATORS
    if operator.trait in ("inputs_quantizable", "concat")
    for name in operator.onnx
} - {*PRODUCTS}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}


def inspect_onnx(path: Path) -> Inspection:
    """What any ONNX file quantizes with pairs; a float model quantizes nothing.

    Raises:
        FileNotFoundError: External data are missing.
        ValueError: It is no ONNX model.
    """
    graph = GraphFacts(path)
    tensors = {tensor.name: tensor for tensor in _tensors(graph)}
    layers = tuple(
        InspectedLayer(name_of(n), n.op_type, _reads_integers(graph, n.input[:2]), graph.macs(n))
        for n in graph.nodes
        if n.op_type in PRODUCTS
    )
    opsets = ", ".join(f"{i.domain or 'ai.onnx'} {i.version}" for i in graph.proto.opset_import)
    facts = {"opsets": opsets, "producer": graph.proto.producer_name}
    foreign = foreign_quantization(all_nodes(graph.proto.graph.node))
    if foreign is not None:
        facts["quantized otherwise"] = foreign.strip()
    return Inspection(
        "QDQ model (ONNX)" if tensors else "ONNX model without QuantizeLinear",
        graph.files,
        tuple(tensors.values()),
        layers,
        graph.operators,
        tuple(name_of(node) for node in graph.nodes if _computes_in_float(graph, node)),
        {heading: text for heading, text in facts.items() if text},
    )


def _tensors(graph: GraphFacts) -> Iterator[InspectedTensor]:
    for node in graph.nodes:
        if node.op_type != "DequantizeLinear" or len(node.input) < 2:
            continue
        quantize = graph.made_by.get(node.input[0])
        real = quantize.input[0] if quantize is not None else node.input[0]
        weight = graph.is_constant(real)
        kind = graph.type_of(node.input[0]) if weight and real == node.input[0] else None
        if kind == "int32":  # a bias
            continue
        scale = graph.array(node.input[1])
        point = node.input[2] if len(node.input) > 2 else ""
        zero_point = graph.array(point)
        keys = keys_of({prop.key: prop.value for prop in node.metadata_props})
        channels = 0 if scale is None or not scale.ndim else scale.size
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        for name in keys or [real]:
            yield InspectedTensor(
                name,
                "weight" if weight else "activation",
                kind or graph.type_of(point) or "uint8",
                () if scale is None else tuple(scale.astype(float).reshape(-1).tolist()),
                (0,) if zero_point is None else tuple(zero_point.astype(int).reshape(-1).tolist()),
                axis if channels > 1 else None,
            )


def _reads_integers(graph: GraphFacts, names: list[str]) -> bool:
    """Whether every tensor comes from integers."""
    sources = [graph.source(name) for name in names]
    return all(node is not None and node.op_type == "DequantizeLinear" for node in sources)


def _computes_in_float(graph: GraphFacts, node: onnx.NodeProto) -> bool:
    """Whether a join reads real values; what belongs to a layer, such as its bias, is none."""
    if node.op_type not in _JOINS:
        return False
    operands = [name for name in node.input if name and not graph.is_constant(name)]
    if node.op_type in _ARITHMETIC and len(operands) < 2:
        made = graph.made_by.get(operands[0]) if operands else None
        if made is None or made.op_type in PRODUCTS:
            return False
    first = operands if node.op_type in (*_ARITHMETIC, "Concat") else operands[:1]
    return not _reads_integers(graph, first)
