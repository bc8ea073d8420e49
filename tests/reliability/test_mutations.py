"""Mutations break a file, keep it a file of its format, and repeat."""

import io
import random
import zipfile

import onnx
from onnx import TensorProto, helper

from reliability.fuzz.mutate_archive import mutate_archive
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.mutate_protobuf import mutate_protobuf


def _model() -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in "xy")
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 3], [0.0] * 9)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Softmax", ["h"], ["y"], axis=-1),
    ]
    return helper.make_model(helper.make_graph(nodes, "graph", [x], [y], [weight]))


def test_a_protobuf_message_changes_in_every_part() -> None:
    changed_parts = set()
    for seed in range(400):
        model, whole = _model(), _model()
        mutate_protobuf(model, random.Random(seed))
        read = onnx.ModelProto.FromString(model.SerializeToString())
        for part in ("node", "input", "output", "initializer"):
            if getattr(read.graph, part) != getattr(whole.graph, part):
                changed_parts.add(part)
    assert changed_parts == {"node", "input", "output", "initializer"}


def test_a_protobuf_mutation_repeats() -> None:
    first, second = _model(), _model()
    mutate_protobuf(first, random.Random(7))
    mutate_protobuf(second, random.Random(7))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(
        deterministic=True
    )


def test_an_archive_stays_an_archive() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", b"one")
        archive.writestr("b", b"two")
    whole = buffer.getvalue()
    lists = set()
    for seed in range(100):
        generator = random.Random(seed)
        broken = mutate_archive(whole, generator, lambda name, data, g: mutate_bytes(data, g))
        with zipfile.ZipFile(io.BytesIO(broken)) as archive:
            lists.add(tuple(archive.namelist()))
    assert {("a", "b"), ("a",), ("b",), ("a", "b", "a")} <= lists
