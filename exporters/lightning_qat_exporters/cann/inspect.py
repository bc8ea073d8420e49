"""What a deploy model, or AMCT's fake-quant model, computes on integers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx

from lightning_qat.export.files.inspection import InspectedLayer, InspectedTensor, Inspection
from lightning_qat_exporters.cann.deploy_file import RNN_OPS, DeployFile, attributes, scales_of
from lightning_qat_exporters.cann.standard_operators.session import is_deploy
from lightning_qat_exporters.onnx_files.graph_facts import PRODUCTS, GraphFacts, name_of

_CHAIN = ("Sub", "Clip", "Add", "Round", "Mul")
"""How AMCT's fake-quant model quantizes, from its end."""


def inspect_ascend(path: Path) -> Inspection | None:
    """What is in a deploy or a fake-quant model; ``None``: it is another ONNX model.

    Raises:
        FileNotFoundError: External data are missing.
        ValueError: It is no ONNX model, or an operator's constants are not those of its kind.
    """
    graph = GraphFacts(path)
    if is_deploy(graph.proto):
        return _deploy(graph)
    quantizers = {n.output[0]: q for n in graph.nodes if (q := _fake_quantizer(graph, n))}
    if not quantizers:
        return None
    layers = [
        InspectedLayer(name_of(n), n.op_type, n.input[0] in quantizers, graph.macs(n))
        for n in graph.nodes
        if n.op_type in PRODUCTS
    ]
    return Inspection(
        "AMCT's fake-quant model (ONNX): float operators on integers' values",
        graph.files,
        (*quantizers.values(), *_fake_weights(graph, quantizers)),
        tuple(layers),
        graph.operators,
    )


def _fake_weights(
    graph: GraphFacts, quantizers: Mapping[str, InspectedTensor]
) -> Iterator[InspectedTensor]:
    """Weights of integers' values, by the factors of the products behind their layers."""
    readers = {node.input[0]: node for node in graph.nodes if node.op_type == "Mul"}
    for node in graph.nodes:
        source = quantizers.get(node.input[0]) if node.op_type in PRODUCTS else None
        factors = readers.get(node.output[0])
        product = None if factors is None else graph.array(factors.input[1])
        if source is not None and product is not None:
            scales = tuple((product.reshape(-1) / np.float32(source.scale[0])).tolist())
            zeros, axis = (0,) * len(scales), 0 if len(scales) > 1 else None
            yield InspectedTensor(node.input[1], "weight", "int8", scales, zeros, axis)


def _deploy(graph: GraphFacts) -> Inspection:
    file = DeployFile(graph.proto, graph.path.parent)
    layers = [
        InspectedLayer(
            name_of(node),
            node.op_type,
            node.op_type in RNN_OPS or file.is_integer_layer(node),
            graph.macs(node),
        )
        for node in graph.nodes
        if node.op_type in (*PRODUCTS, *RNN_OPS)
    ]
    try:
        tensors = tuple(_deploy_tensors(file))
    except (KeyError, ArithmeticError) as error:
        raise ValueError(
            f"{str(graph.path)!r} breaks rules of deploy models ({type(error).__name__}: {error}); "
            "lightning-qat lint names them."
        ) from error
    return Inspection(
        "deploy model for Ascend (ONNX)",
        graph.files,
        tensors,
        tuple(layers),
        graph.operators,
    )


def _deploy_tensors(file: DeployFile) -> Iterator[InspectedTensor]:
    for node in file.nodes:
        of = attributes(node)
        if node.op_type == "AscendQuant":
            scale = float(np.float32(1) / np.float32(of["scale"]))
            kind = str(of.get("dst_type", "INT8")).lower()
            point = int(of.get("offset", 0))
            yield InspectedTensor(name_of(node), "activation", kind, (scale,), (point,))
        elif node.op_type == "AscendDequant":
            yield from _weight(file, node)


def _weight(file: DeployFile, dequant: onnx.NodeProto) -> Iterator[InspectedTensor]:
    """The weight before a dequant node, whose scales are those of the product."""
    layer, name = file.maker.get(dequant.input[0]), next(iter(dequant.input[1:]), "")
    product = file.array(name)
    quant = None if layer is None else file.quant_before(layer)
    if layer is None or product is None or quant is None:
        return
    # The node holds the float32 reciprocal of the input's scale.
    scales = scales_of(product).reshape(-1) * np.float32(attributes(quant)["scale"])
    zeros = (0,) * scales.size
    axis = 0 if scales.size > 1 else None
    yield InspectedTensor(layer.input[1], "weight", "int8", tuple(scales.tolist()), zeros, axis)


def _fake_quantizer(graph: GraphFacts, node: onnx.NodeProto) -> InspectedTensor | None:
    """What ``Mul -> Round -> Add -> Clip -> Sub`` quantizes, by its last node."""
    chain: Mapping[str, onnx.NodeProto] = {}
    found: onnx.NodeProto | None = node
    for kind in _CHAIN:
        if found is None or found.op_type != kind:
            return None
        chain = {**chain, kind: found}
        found = graph.made_by.get(found.input[0])
    numbers = [
        graph.array(name)
        for name in (chain["Mul"].input[1], chain["Add"].input[1], *chain["Clip"].input[1:3])
    ]
    if any(array is None or array.size != 1 for array in numbers):
        return None
    factor, offset, _, high = (float(np.asarray(array).reshape(-1)[0]) for array in numbers)
    bits = int(high).bit_length() + 1
    scale = float(np.float32(1) / np.float32(factor))
    name = name_of(chain["Mul"]).removesuffix(".mul").removesuffix(".quant.fakequant")
    return InspectedTensor(name, "activation", f"int{bits}", (scale,), (int(offset),))
