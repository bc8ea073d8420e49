"""A TFLite file of anyone is read within its own size, or refused as damaged."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_qat_exporters.tflite.flatbuffer.file import pack, read, schema
from lightning_qat_exporters.tflite.inspect import inspect_tflite

pytest.importorskip("ai_edge_litert")


def file(tensors: int = 2, subgraphs: int = 1) -> Any:
    """A graph of one ADD, as LiteRT's objects."""
    s = schema()
    model, code = s.ModelT(), s.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = s.BuiltinOperator.ADD
    model.operatorCodes, model.buffers, model.version = [code], [s.BufferT()], 3
    model.subgraphs = [s.SubGraphT() for _ in range(subgraphs)]
    graph = model.subgraphs[0]
    graph.tensors = [s.TensorT() for _ in range(tensors)]
    for index, tensor in enumerate(graph.tensors):
        tensor.name, tensor.shape = f"t{index}".encode(), np.asarray([1, 2], np.int32)
    operator = s.OperatorT()
    operator.inputs, operator.outputs = [0, 0], [1]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    return model


def test_a_whole_file_is_read() -> None:
    found = read(pack(file()))
    assert [(op.kind, op.inputs, op.outputs) for op in found.operators] == [("ADD", (0, 0), (1,))]
    assert found.inputs == {"t0": 0}


def start_of_vector(content: bytes, table: Any, field: int) -> int:
    place: int = table._tab.Vector(table._tab.Offset(field))
    return place


def test_a_vector_that_claims_four_billion_tables_is_refused_at_once() -> None:
    content = bytearray(pack(file()))
    model = schema().Model.GetRootAsModel(content, 0)
    struct.pack_into("<I", content, start_of_vector(content, model, 8) - 4, 2**32 - 1)
    with pytest.raises(ValueError, match=r"damaged \(it claims to hold more than it does"):
        read(bytes(content))


def test_tables_that_all_refer_to_one_are_refused() -> None:
    # 600 graphs that are one of 600 tensors: 360,000 tensors in a file of 60 kB.
    content = bytearray(pack(file(tensors=600, subgraphs=600)))
    model = schema().Model.GetRootAsModel(content, 0)
    start = start_of_vector(content, model, 8)
    first = start + struct.unpack_from("<I", content, start)[0]
    for place in range(start, start + 4 * 600, 4):
        struct.pack_into("<I", content, place, first - place)
    with pytest.raises(ValueError, match=r"damaged \(it claims to hold more than it does"):
        read(bytes(content))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: setattr(g.operators[0], "inputs", [7, 0]), "names tensor 7 of 2"),
        (lambda g: setattr(g, "outputs", [-2]), "IndexError|names tensor -2 of 2"),
        (
            lambda g: setattr(g.tensors[0], "shape", np.asarray([2**30, 2**30], np.int32)),
            r"a tensor has shape \[1073741824, 1073741824\]",
        ),
        (lambda g: setattr(g.tensors[0], "buffer", 9), "IndexError"),
        (lambda g: setattr(g.tensors[0], "name", None), "AttributeError"),
    ],
    ids=["operator", "output", "size", "buffer", "name"],
)
def test_fields_without_sense_are_refused(change: Any, text: str, tmp_path: Path) -> None:
    model = file()
    change(model.subgraphs[0])
    path = tmp_path / "net.tflite"
    path.write_bytes(pack(model))
    with pytest.raises(ValueError, match=rf"net\.tflite' must be a whole TFLite file: .*({text})"):
        inspect_tflite(path)
