"""Whether names are text: protobuf takes any bytes for it in ONNX's files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from onnx import FunctionProto, GraphProto, ModelProto, StringStringEntryProto

from lightning_qat_exporters.onnx_files.nested import subgraphs
from lightning_qat_exporters.onnx_files.other_domains import OWN


def check_names(proto: ModelProto, path: str) -> None:
    """Read every name, and every text in the attributes of ONNX's own operators, once.

    Raises:
        ValueError: One is no UTF-8; its bytes are shown.
    """
    for name in _names(proto):
        # One implementation of protobuf gives bytes, the others raise UnicodeDecodeError.
        if isinstance(name, bytes):
            raise ValueError(
                f"Names and other text in {path!r} must be UTF-8; one is {name[:40]!r}."
            )


def _names(proto: ModelProto) -> Iterator[str | bytes]:
    yield from (proto.producer_name, proto.producer_version, proto.domain, proto.doc_string)
    yield from _entries((*proto.metadata_props, *proto.graph.metadata_props))
    yield from (opset.domain for opset in proto.opset_import)
    yield from _graph_names(proto.graph)
    for function in proto.functions:
        yield from (function.name, function.domain, function.overload)
        yield from (*function.attribute, *function.input, *function.output)
        yield from _node_names(function)


def _graph_names(graph: GraphProto) -> Iterator[str | bytes]:
    yield from (graph.name, graph.doc_string)
    yield from (tensor.name for tensor in graph.initializer)
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield value.name
        yield from (dim.dim_param for dim in value.type.tensor_type.shape.dim)
    yield from _node_names(graph)


def _node_names(graph: GraphProto | FunctionProto) -> Iterator[str | bytes]:
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, node.overload)
        yield from (*node.input, *node.output)
        yield from _entries(node.metadata_props)
        for attribute in node.attribute:
            yield from (attribute.name, attribute.ref_attr_name)
            if node.domain in OWN:  # other domains keep bytes in them
                yield from map(_text, (attribute.s, *attribute.strings))
        for subgraph in subgraphs(node):
            yield from _graph_names(subgraph)


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value


def _entries(entries: Iterable[StringStringEntryProto]) -> Iterator[str | bytes]:
    for entry in entries:
        yield from (entry.key, entry.value)
