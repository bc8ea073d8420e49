"""Show values inside an ONNX graph as outputs, and cut the graph there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from lightning_qat.export.protocol import CannotRun
from lightning_qat_exporters.onnx_files.read import load_with_data

_LIMIT = 2**31 - 2**20
"""A little less than protobuf serializes."""


def loaded(path: Path, runtime: str) -> onnx.ModelProto:
    """A file with its external data, to be changed and run from memory.

    Raises:
        CannotRun: It is larger than a protobuf message may be.
    """
    proto = load_with_data(path)
    if proto.ByteSize() > _LIMIT:
        raise CannotRun(runtime, "with its weights in one message it is larger than 2 GiB")
    return proto


def show(proto: onnx.ModelProto, names: Iterable[str], elem_type: int) -> None:
    """Make values outputs of the graph, in place; those that are outputs already stay.

    Args:
        proto: The model.
        names: Names of the values.
        elem_type: Their type, as ``TensorProto`` numbers it.
    """
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(
        helper.make_tensor_value_info(name, elem_type, None)
        for name in dict.fromkeys(names)
        if name not in known
    )


def given_name(name: str) -> str:
    """The name of the input that stands in for a value."""
    return f"{name}__given"


def read_from(
    proto: onnx.ModelProto, sources: Mapping[str, str], spared: Iterable[onnx.NodeProto] = ()
) -> None:
    """Let every reader of a value read another one, in place.

    Args:
        proto: The model.
        sources: Name of a value to that of the one to read in its place.
        spared: Nodes that go on reading what they read.
    """
    kept = {id(node) for node in spared}
    for node in proto.graph.node:
        if id(node) not in kept:
            node.input[:] = [sources.get(name, name) for name in node.input]


def add_inputs(proto: onnx.ModelProto, names: Iterable[str]) -> None:
    """Add float inputs of any shape to the graph, in place."""
    proto.graph.input.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
