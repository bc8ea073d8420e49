"""Whether inputs, outputs and what lies between have types that onnx knows."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir
from onnx import GraphProto, ModelProto, TypeProto, ValueInfoProto

from lightning_qat_exporters.onnx_files.nested import subgraphs

_KNOWN = frozenset(int(kind) for kind in ir.DataType)


def check_values(proto: ModelProto, path: str) -> None:
    """Check the types that a model writes down; a value without any is left to its reader.

    Raises:
        ValueError: A type is unknown, or left out of a tensor's; the value is named.
    """
    for value in (*_values(proto.graph), *(v for f in proto.functions for v in f.value_info)):
        number = _element(value.type)
        if number is not None and number not in _KNOWN:
            raise ValueError(
                f"The tensor {value.name!r} in {path!r} must have a type that onnx knows; it has "
                f"{'none' if number < 0 else f'number {number}'}."
            )


def _element(type_: TypeProto) -> int | None:
    """The number of the type within sequences, optional values and maps; -1: left out."""
    kind = type_.WhichOneof("value")
    if kind in ("tensor_type", "sparse_tensor_type"):
        tensor = getattr(type_, kind)
        return int(tensor.elem_type) if tensor.HasField("elem_type") else -1
    if kind in ("sequence_type", "optional_type"):
        return _element(getattr(type_, kind).elem_type)
    if kind == "map_type":
        return _element(type_.map_type.value_type)
    return None


def _values(graph: GraphProto) -> Iterator[ValueInfoProto]:
    yield from (*graph.input, *graph.output, *graph.value_info)
    for node in graph.node:
        for subgraph in subgraphs(node):
            yield from _values(subgraph)
