"""Write an ONNX file one tensor after the other, so that weights are in memory once.

``SerializeToString`` would hold them three times: as arrays, in the message and in its bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

STREAMED_BYTES = 2**16
"""Initializers of this size and more go to the file by themselves."""

_LENGTH_DELIMITED = 2


def write_streamed(model: ir.Model, path: Path) -> None:
    """Write a model into one file, in protobuf's wire format.

    The bytes are those of a ``ModelProto`` whose graph comes last, and in it the initializers:
    protobuf allows a message's fields in any order. External data becomes part of the file.

    Args:
        model: The model, below protobuf's 2 GB.
        path: The file.
    """
    proto, large = _without_large(model)
    tensors = [(t.SerializeToString(), large.get(t.name)) for t in proto.graph.initializer]
    del proto.graph.initializer[:]
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    entries = [(_entry(head, tensor), tensor) for head, tensor in tensors]
    size = len(graph) + sum(len(e) + (0 if t is None else t.nbytes) for e, t in entries)
    with path.open("wb") as file:
        file.write(proto.SerializeToString())
        file.write(_field(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
        for entry, tensor in entries:
            file.write(entry)
            if tensor is not None:
                _write_values(tensor, file)


def _without_large(
    model: ir.Model,
) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The model's message with large initializers empty, and their values by name."""
    held = {
        value: value.const_value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and value.const_value.dtype != ir.DataType.STRING
        and (
            value.const_value.nbytes >= STREAMED_BYTES
            or isinstance(value.const_value, ir.ExternalTensor)
        )
    }
    try:
        for value, tensor in held.items():
            value.const_value = ir.Tensor(np.empty(0, tensor.dtype.numpy()), dtype=tensor.dtype)
        proto = ir.to_proto(model)
    finally:
        for value, tensor in held.items():
            value.const_value = tensor
    large = {value.name or "": tensor for value, tensor in held.items()}
    for message in proto.graph.initializer:
        if message.name in large:
            message.ClearField("raw_data")
            message.dims[:] = large[message.name].shape.numpy()
    return proto, large


def _entry(head: bytes, tensor: ir.TensorProtocol | None) -> bytes:
    """A graph's field with one tensor, up to the values that are written apart."""
    values = (
        b"" if tensor is None else _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, tensor.nbytes)
    )
    size = len(head) + len(values) + (0 if tensor is None else tensor.nbytes)
    return _field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, size) + head + values


def _field(number: int, size: int) -> bytes:
    """What precedes a field of so many bytes: its tag and its length."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(size)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow.

    >>> list(_varint(300))
    [172, 2]
    """
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))


def _write_values(tensor: ir.TensorProtocol, file: BinaryIO) -> None:
    begin = file.tell()
    tensor.tofile(file)  # type: ignore[attr-defined]  # every tensor has it, the protocol not yet
    assert file.tell() - begin == tensor.nbytes  # the length stands before them
