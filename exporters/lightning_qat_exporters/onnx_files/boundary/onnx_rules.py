"""ONNX's own rules, by onnx's checker, without its copies of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from lightning_qat_exporters.onnx_files.boundary.inference import check_inference
from lightning_qat_exporters.onnx_files.nested import all_nodes, subgraphs
from lightning_qat_exporters.onnx_files.other_domains import OWN

_LARGE = 1024
"""Bytes from which a tensor is left out: no operator's output shape follows from so many values."""
_STUB = "lightning_qat.stub"
"""The domain of what the checker need not know: it takes every operator of another's domain."""


def check_rules(proto: ModelProto, path: str, *, standard: bool) -> None:
    """Check numbers of inputs and outputs, attributes, names and versions by onnx's checker.

    Args:
        proto: The model; every tensor has its data, or declares where they are.
        path: Its file, for messages.
        standard: Refuse unknown operators in ONNX's own domain, and types and shapes that
            contradict each other. Ascend's deploy models have both.

    Raises:
        ValueError: A rule is broken; the message is the checker's. Or onnx's inference of shapes
            would end the process.
    """
    if standard:
        _check_inputs(proto.graph, path)
    outline = _outline(proto, standard=standard)
    check_inference(outline, path)
    try:
        onnx.checker.check_model(outline, full_check=standard)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        lines = (line.strip() for line in str(error).splitlines())
        said = " ".join(line for line in lines if line)
        raise ValueError(f"{path!r} breaks a rule of ONNX: {said}") from error


def _check_inputs(graph: GraphProto, path: str) -> None:
    """ONNX Runtime demands a type, where onnx's checker wants a shape as well."""
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name not in constants and value.type.WhichOneof("value") is None:
            raise ValueError(f"Inputs must have a type; {value.name!r} of {path!r} has none.")


def _outline(proto: ModelProto, *, standard: bool) -> ModelProto:
    """A copy with stubs in place of large tensors, and of inputs that have no shape.

    The checker wants a shape where ONNX Runtime and other tools do without.
    """
    outline = ModelProto()
    # What is newer than onnx, the readers of files say in their own words.
    outline.ir_version = min(proto.ir_version, onnx.IR_VERSION)
    outline.opset_import.extend(proto.opset_import)
    outline.metadata_props.extend(proto.metadata_props)
    outline.functions.extend(proto.functions)
    _copy_without_large(proto.graph, outline.graph)
    shapeless = [value.name for value in proto.graph.input if not _has_shape(value)]
    for values in (outline.graph.input, outline.graph.output):
        shaped = [value for value in values if _has_shape(value)]
        del values[:]
        values.extend(shaped)
    _put_first(outline.graph, [_stub(name) for name in shapeless])
    for owner in (outline, *outline.functions):
        owner.opset_import.append(helper.make_opsetid(_STUB, 1))
    if not standard:
        for nodes in (outline.graph.node, *(function.node for function in outline.functions)):
            _rename_unknown(nodes)
    return outline


def _copy_without_large(source: GraphProto, target: GraphProto) -> None:
    """Copy a graph; nodes without schema make what its large tensors hold."""
    target.name = source.name or "graph"
    target.input.extend(source.input)
    target.output.extend(source.output)
    target.value_info.extend(source.value_info)
    target.sparse_initializer.extend(source.sparse_initializer)
    given = {value.name for value in source.input}
    stubs = []
    for tensor in source.initializer:
        if not _is_large(tensor) or not tensor.name:
            target.initializer.append(tensor)
        elif tensor.name not in given:
            stubs.append(_stub(tensor.name))
            target.value_info.append(_typed(tensor.name, tensor))
    target.node.extend(stubs)
    for node in source.node:
        values = [a.t for a in node.attribute if a.name == "value" and a.HasField("t")]
        if node.op_type == "Constant" and any(map(_is_large, values)) and len(node.output) == 1:
            target.node.append(_stub(node.output[0]))
            target.value_info.append(_typed(node.output[0], values[0]))
        elif any(subgraphs(node)):
            target.node.append(_with_small_graphs(node))
        else:
            target.node.append(node)


def _with_small_graphs(node: NodeProto) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    for attribute, original in zip(copy.attribute, node.attribute, strict=True):
        if original.HasField("g"):
            attribute.ClearField("g")
            attribute.g.SetInParent()
            _copy_without_large(original.g, attribute.g)
        del attribute.graphs[:]
        for graph in original.graphs:
            _copy_without_large(graph, attribute.graphs.add())
    return copy


def _has_shape(value: onnx.ValueInfoProto) -> bool:
    """Whether a value has a type, and, as a tensor, a number of dimensions."""
    kind = value.type.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        return bool(getattr(value.type, kind).HasField("shape"))
    return kind is not None


def _is_large(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL or tensor.ByteSize() > _LARGE


def _stub(name: str) -> NodeProto:
    return NodeProto(output=[name], domain=_STUB, op_type="Given")


def _typed(name: str, tensor: TensorProto) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, tensor.data_type, [*tensor.dims])


def _put_first(graph: GraphProto, nodes: list[NodeProto]) -> None:
    if nodes:
        after = [*graph.node]
        del graph.node[:]
        graph.node.extend([*nodes, *after])


def _rename_unknown(nodes: Iterable[NodeProto]) -> None:
    """Move operators that onnx does not know out of its domain, in subgraphs as well."""
    for node in all_nodes(nodes):
        if node.domain in OWN and not onnx.defs.has(node.op_type):
            node.domain = _STUB
