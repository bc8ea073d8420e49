"""Whether the data of every tensor are there, in the file or beside it, before memory is taken.

A tensor of 60 bytes may declare any shape; whoever makes an array of it takes what it declares.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto

_FIELDS: Mapping[int, tuple[str, int]] = {
    TensorProto.FLOAT: ("float_data", 1),
    TensorProto.COMPLEX64: ("float_data", 2),
    TensorProto.DOUBLE: ("double_data", 1),
    TensorProto.COMPLEX128: ("double_data", 2),
    TensorProto.INT64: ("int64_data", 1),
    TensorProto.UINT32: ("uint64_data", 1),
    TensorProto.UINT64: ("uint64_data", 1),
    TensorProto.STRING: ("string_data", 1),
}
"""The field that holds a type's values where ``raw_data`` does not, and its entries per element;
``int32_data`` holds every other type, those below 8 bits packed into bytes."""


def check_stored_data(proto: ModelProto, path: Path) -> int:
    """Check that every tensor's shape is that of the data stored for it; no data are read.

    Args:
        proto: The model.
        path: Its file, beside which external data lie.

    Returns:
        The bytes that all of them take in memory.

    Raises:
        FileNotFoundError: A file of external data is missing.
        ValueError: A tensor declares more or less than is stored for it, has no known type, or its
            data lie outside the model's folder; it is named.
    """
    return sum(_checked(tensor, name, path) for name, tensor in _tensors(proto))


def external_files(proto: ModelProto) -> tuple[str, ...]:
    """Names of the files beside the model that hold data of it, sorted."""
    found = {
        entry.value
        for _, tensor in _tensors(proto)
        if tensor.data_location == TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return tuple(sorted(found))


def _tensors(proto: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every tensor with a name for messages."""
    yield from _in_graph(proto.graph)
    for function in proto.functions:
        yield from _in_nodes(function)
        for attribute in function.attribute_proto:
            yield from _in_attribute(attribute, function.name)


def _in_graph(graph: GraphProto) -> Iterator[tuple[str, TensorProto]]:
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for sparse in graph.sparse_initializer:
        yield sparse.values.name, sparse.values
        yield sparse.indices.name or sparse.values.name, sparse.indices
    yield from _in_nodes(graph)


def _in_nodes(graph: GraphProto | FunctionProto) -> Iterator[tuple[str, TensorProto]]:
    for node in graph.node:
        for attribute in node.attribute:
            yield from _in_attribute(attribute, _name(node))


def _in_attribute(attribute: AttributeProto, owner: str) -> Iterator[tuple[str, TensorProto]]:
    """What an attribute's fields hold, whatever type it says it has."""
    if attribute.HasField("t"):
        yield attribute.t.name or owner, attribute.t
    for tensor in attribute.tensors:
        yield tensor.name or owner, tensor
    sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
    for part in (*sparse, *attribute.sparse_tensors):
        yield part.values.name or owner, part.values
        yield part.indices.name or owner, part.indices
    if attribute.HasField("g"):
        yield from _in_graph(attribute.g)
    for graph in attribute.graphs:
        yield from _in_graph(graph)


def _name(node: NodeProto) -> str:
    return (node.output[0] if node.output else "") or node.name or node.op_type


def _checked(tensor: TensorProto, name: str, path: Path) -> int:
    """Bytes that a tensor's array takes; its data are there."""
    where = f"The tensor {name!r} in {str(path)!r}"
    if min(tensor.dims, default=0) < 0:
        raise ValueError(f"{where} must have sizes of 0 or more; it has {[*tensor.dims]}.")
    elements = math.prod(tensor.dims)
    if tensor.data_type == TensorProto.STRING:
        _check_count(tensor, elements, where)
        return sum(map(len, tensor.string_data))
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (TypeError, ValueError):
        raise ValueError(
            f"{where} must have a type that onnx knows; it has number {tensor.data_type}."
        ) from None
    needed = math.ceil(elements * bits / 8) if bits < 8 else elements * bits // 8
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_external(tensor, needed, where, path)
    elif tensor.HasField("raw_data"):
        if len(tensor.raw_data) != needed:
            raise ValueError(
                f"{where} must have {needed} bytes for its shape {[*tensor.dims]}; it has "
                f"{len(tensor.raw_data)}."
            )
    else:
        _check_count(tensor, math.ceil(elements * bits / 8) if bits < 8 else elements, where)
    return int(max(needed, elements))


def _check_count(tensor: TensorProto, count: int, where: str) -> None:
    """Check the number of entries of the field that holds a type's values."""
    field, per_element = _FIELDS.get(tensor.data_type, ("int32_data", 1))
    stored = len(getattr(tensor, field))
    if stored != count * per_element:
        has = f"it has {stored}" if stored else "it has no data"
        raise ValueError(
            f"{where} must have {count * per_element} values in {field} for its shape "
            f"{[*tensor.dims]}; {has}."
        )


def _check_external(tensor: TensorProto, needed: int, where: str, path: Path) -> None:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if any(isinstance(text, bytes) for entry in entries.items() for text in entry):
        raise ValueError(f"{where} must name its external data in UTF-8; it has {entries}.")
    if len(entries) < len(tensor.external_data):
        keys = [entry.key for entry in tensor.external_data]
        raise ValueError(f"{where} must say once where its external data lie; it has {keys}.")
    location = Path(entries.get("location", ""))
    file = path.parent / location
    if location.is_absolute() or ".." in location.parts or not location.parts:
        raise ValueError(
            f"External data must lie beside the model; {_lower(where)} names {str(location)!r}."
        )
    try:
        found = file.is_file()
    except OSError:  # no file can have such a name
        found = False
    if not found:
        raise FileNotFoundError(
            f"{where} has its data in {str(file)!r}; no file is there. Put it beside the model."
        )
    # Downloads are often links into a store, the model as well as its data.
    if not {file.resolve().parent, *file.resolve().parents} & {
        path.parent.resolve(),
        path.resolve().parent,
    }:
        raise ValueError(
            f"External data must lie beside the model; {_lower(where)} names {str(location)!r}, a "
            f"link to {str(file.resolve())!r}."
        )
    size = file.stat().st_size
    offset = _number(entries, "offset", 0, where)
    # Without a length they reach to the end of the file.
    length = _number(entries, "length", max(size - offset, 0), where)
    if length != needed or offset + needed > size:
        raise ValueError(
            f"{where} must have {needed} bytes of data in {str(file)!r}, from byte {offset}; it "
            f"names {length}; the file ends at {size}."
        )


def _number(entries: Mapping[str, str], key: str, default: int, where: str) -> int:
    text = entries.get(key, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{where} must have a number as its {key}; it has {text[:40]!r}.")
    return int(text)


def _lower(where: str) -> str:
    return where[0].lower() + where[1:]
