"""Files that lie about themselves are refused before anything is made of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lightning_qat_exporters.onnx_files.boundary.functions import DEEPEST
from lightning_qat_exporters.onnx_files.read import load_proto, load_with_data, read_onnx

OLD_ONNX = tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 19)
WEIGHT = np.ones((2, 2), np.float32)


def model() -> ModelProto:
    """``y = relu(x @ w)``."""
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["m"], "fc"),
            helper.make_node("Relu", ["m"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def saved(proto: ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def put(proto: ModelProto, tensor: TensorProto, place: str) -> None:
    """Put a tensor where a file can have one."""
    name = f"put in {place}"
    constant = helper.make_node("Constant", [], [name], value=tensor)
    types = [helper.make_tensor_value_info(name, tensor.data_type, None)]
    if place == "initializer":
        proto.graph.initializer.append(tensor)
    elif place == "attribute":
        proto.graph.node.append(constant)
    elif place == "subgraph":
        graph = helper.make_graph([constant], "then", [], types)
        proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
        node = helper.make_node("If", ["c"], ["z"], then_branch=graph, else_branch=graph)
        proto.graph.node.append(node)
    elif place == "function":
        imports = [helper.make_opsetid("", 18)]
        proto.functions.append(helper.make_function("own", "F", [], [name], [constant], imports))
    else:
        sparse = proto.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(tensor)
        sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64), "i"))


PLACES = ("initializer", "attribute", "subgraph", "function", "sparse")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dims", [[3], [2**33, 1, 1, 1], [600_000_000]])
def test_a_tensor_without_the_data_that_it_declares_is_refused_by_name(
    place: str, dims: list[int], tmp_path: Path
) -> None:
    proto = model()
    put(proto, TensorProto(name="lie", data_type=TensorProto.INT8, dims=dims), place)
    with pytest.raises(ValueError, match=r"tensor 'lie' .* in int32_data for its shape .*no data"):
        load_proto(saved(proto, tmp_path))


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (TensorProto(data_type=1, dims=[2], raw_data=b"1234567"), r"must have 8 bytes .* it has 7"),
        (TensorProto(data_type=1, dims=[-1]), r"sizes of 0 or more; it has \[-1\]"),
        (TensorProto(data_type=1, dims=[2], float_data=[1]), r"2 values in float_data .*has 1"),
        (TensorProto(data_type=1, dims=[1], int32_data=[1]), r"1 values in float_data .*no data"),
        (
            TensorProto(data_type=8, dims=[2], string_data=[b"a"]),
            r"2 values in string_data .*has 1",
        ),
        (TensorProto(data_type=22, dims=[3], int32_data=[1]), r"2 values in int32_data .*has 1"),
        (TensorProto(data_type=14, dims=[1], float_data=[1]), r"2 values in float_data .*has 1"),
        (TensorProto(data_type=0, dims=[1]), r"type that onnx knows; it has number 0"),
        (TensorProto(data_type=99, dims=[1]), r"type that onnx knows; it has number 99"),
    ],
)
def test_shape_type_and_data_must_agree(tensor: TensorProto, match: str, tmp_path: Path) -> None:
    proto = model()
    tensor.name = "t"
    proto.graph.initializer.append(tensor)
    with pytest.raises(ValueError, match=rf"tensor 't' .*{match}"):
        load_proto(saved(proto, tmp_path))


def test_data_of_every_type_are_taken_as_onnx_writes_them(tmp_path: Path) -> None:
    proto = model()
    for number, name in {n: name for name, n in TensorProto.DataType.items() if n}.items():
        values: Any = [b"a", b"b", b"c"] if name == "STRING" else [1, 0, 1]
        proto.graph.initializer.append(helper.make_tensor(name, number, [3], values))
        # onnx 1.17 and 1.18 do not read the complex and odd tensors that it makes.
        if name != "STRING" and not (OLD_ONNX and name.startswith(("COMPLEX", "INT4", "UINT4"))):
            raw = numpy_helper.from_array(numpy_helper.to_array(proto.graph.initializer[-1]))
            raw.name = f"{name}.raw"
            proto.graph.initializer.append(raw)
    # Two complex and two packed types less, as raw data.
    assert len(load_proto(saved(proto, tmp_path)).graph.initializer) > (36 if OLD_ONNX else 40)


def external(folder: Path, size: int = 16, **entries: str) -> Path:
    proto = model()
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "w.bin").write_bytes(b"1" * size)
    return saved(proto, folder)


@pytest.mark.parametrize(
    ("size", "entries", "match"),
    [
        (15, {}, r"16 bytes of data .* from byte 0; .*ends at 15"),
        (16, {"offset": "1"}, r"16 bytes of data .* from byte 1; .*ends at 16"),
        (32, {"length": "17"}, r"16 bytes of data .* names 17"),
        (32, {"offset": "-1"}, r"a number as its offset; it has '-1'"),
        (32, {"length": "x"}, r"a number as its length; it has 'x'"),
        (32, {"offset": "9" * 5000}, r"a number as its offset; it has '9{40}'"),
        (16, {"location": ""}, r"must lie beside the model"),
        (16, {"location": "."}, r"must lie beside the model"),
        (16, {"location": "/etc/passwd"}, r"must lie beside the model; .*'/etc/passwd'"),
        (16, {"location": "a/../../w.bin"}, r"must lie beside the model"),
        (16, {"location": "no.bin"}, r"no file is there"),
        (16, {"location": "a" * 5000}, r"no file is there"),
    ],
)
def test_external_data_are_there_and_beside_the_model(
    size: int, entries: dict[str, str], match: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=rf"tensor 'w' .*{match}|{match}"):
        load_proto(external(tmp_path, size, **entries))


def test_external_data_of_the_right_size_are_read(tmp_path: Path) -> None:
    path = external(tmp_path, 48, offset="32", length="16")
    loaded = load_with_data(path)
    assert loaded.graph.initializer[0].raw_data == b"1" * 16


def test_a_link_out_of_the_folder_is_refused_and_a_store_of_links_is_not(tmp_path: Path) -> None:
    path = external(tmp_path)
    store, elsewhere = tmp_path / "store", tmp_path / "snapshot"
    store.mkdir()
    elsewhere.mkdir()
    (tmp_path / "w.bin").rename(store / "hash1")
    (tmp_path / "w.bin").symlink_to(store / "hash1")
    load_proto(path)  # below the folder
    (elsewhere / "m.onnx").write_bytes(path.read_bytes())
    (elsewhere / "w.bin").symlink_to(store / "hash1")
    with pytest.raises(ValueError, match=r"beside the model; .*a link to .*hash1"):
        load_proto(elsewhere / "m.onnx")
    (elsewhere / "m.onnx").rename(store / "hash2")
    (elsewhere / "m.onnx").symlink_to(store / "hash2")
    load_proto(elsewhere / "m.onnx")


def remove_input(proto: ModelProto) -> None:
    del proto.graph.node[0].input[1]


def another_type(proto: ModelProto) -> None:
    proto.graph.node[1].op_type = "LeakyRelu"
    proto.graph.node[1].attribute.append(helper.make_attribute("alpha", "much"))


def no_opset(proto: ModelProto) -> None:
    del proto.opset_import[:]


def unknown_attribute(proto: ModelProto) -> None:
    proto.graph.node[0].attribute.append(helper.make_attribute("axis", 1))


def twice(proto: ModelProto) -> None:
    proto.graph.initializer.append(proto.graph.initializer[0])


def calls_itself(proto: ModelProto) -> None:
    add_function(proto, "F", ["G"])
    add_function(proto, "G", ["F"])


def grows(proto: ModelProto) -> None:
    for level in range(32):
        add_function(proto, f"F{level}", [f"F{level + 1}"] * 2)
    proto.graph.node.append(helper.make_node("F0", ["m"], ["z"], domain="own"))


def nested(proto: ModelProto) -> None:
    for level in reversed(range(DEEPEST + 1)):
        add_function(proto, f"F{level}", [f"F{level + 1}"])


def add_function(proto: ModelProto, name: str, calls: list[str]) -> None:
    nodes = [
        helper.make_node(called, ["a"], [f"b{i}"], domain="own") for i, called in enumerate(calls)
    ]
    imports = [helper.make_opsetid("own", 1)]
    proto.functions.append(helper.make_function("own", name, ["a"], ["b0"], nodes, imports))


RULES: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "inputs": (remove_input, r"Node\(fc\) .* has input size 1 not in range \[min=2"),
    "type of an attribute": (another_type, r"Mismatched attribute type .*alpha"),
    "unknown attribute": (unknown_attribute, r"Unrecognized attribute: axis for operator MatMul"),
    "opset": (no_opset, r"No opset import for domain ''"),
    "one name twice": (twice, r"w initializer name is not unique"),
    "cycle of functions": (
        calls_itself,
        r"must not call themselves; .*'own.F' -> 'own.G' -> 'own.F",
    ),
    "growth": (grows, r"at most 1000000 nodes when its functions are inlined; .* 429496729\d"),
    "depth": (nested, r"nested at most 64 deep; .*'own.F0'"),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_broken_rule_of_onnx_is_said(rule: str, tmp_path: Path) -> None:
    break_it, match = RULES[rule]
    proto = model()
    break_it(proto)
    with pytest.raises(ValueError, match=match):
        load_proto(saved(proto, tmp_path))


def test_shapes_and_unknown_operators_are_checked_where_a_model_must_be_standard(
    tmp_path: Path,
) -> None:
    wrong = model()
    wrong.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, 2), np.float32), "w"))
    with pytest.raises(ValueError, match=r"Incompatible dimensions for matrix multiplication"):
        read_onnx(saved(wrong, tmp_path))
    ascend = model()
    ascend.graph.node[1].op_type = "AscendQuant"
    path = saved(ascend, tmp_path)
    load_proto(path)
    read_onnx(path, standard=False)
    with pytest.raises(ValueError, match=r"No Op registered for AscendQuant"):
        read_onnx(path)
    ascend.graph.node[1].domain = "own"
    read_onnx(saved(ascend, tmp_path))


def test_inputs_and_outputs_without_a_shape_are_taken(tmp_path: Path) -> None:
    proto = model()
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    read_onnx(saved(proto, tmp_path))
    for value in proto.graph.output:
        value.ClearField("type")
    read_onnx(saved(proto, tmp_path))


def test_what_onnx_runtime_demands_beyond_the_checker_is_said(tmp_path: Path) -> None:
    untyped = model()
    untyped.graph.input[0].ClearField("type")
    with pytest.raises(ValueError, match=r"Inputs must have a type; 'x' .* has none"):
        read_onnx(saved(untyped, tmp_path))
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[0].external_data.add(key="location", value="w.bin")
    with pytest.raises(ValueError, match=r"say once where .* \['location', 'location'\]"):
        load_proto(saved(proto, tmp_path))


def test_the_checker_gets_no_copy_of_large_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = model()
    large = numpy_helper.from_array(np.zeros(100_000, np.float32), "large")
    for place in ("attribute", "subgraph"):
        put(proto, large, place)
    put(proto, large, "initializer")
    seen: list[int] = []
    check = onnx.checker.check_model
    monkeypatch.setattr(
        onnx.checker,
        "check_model",
        lambda made, **options: (seen.append(made.ByteSize()), check(made, **options)),
    )
    load_proto(saved(proto, tmp_path))
    assert proto.ByteSize() > 1_200_000
    assert seen[0] < 2_000


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = saved(model(), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\x02fc", b"\x02\xff\xfe"))
    with pytest.raises(ValueError, match=r"must be UTF-8; one is b'.xff.xfe'"):
        load_proto(path)


def test_text_in_attributes_is_text_but_for_operators_of_others(tmp_path: Path) -> None:
    proto = model()
    proto.graph.node[1].op_type = "EPContext"
    proto.graph.node[1].domain = "own"
    proto.graph.node[1].attribute.append(helper.make_attribute("cache", b"\xff\xfe"))
    load_proto(saved(proto, tmp_path))
    proto.graph.node[0].attribute.append(helper.make_attribute("auto_pad", b"\xff\xfe"))
    with pytest.raises(ValueError, match=r"must be UTF-8; one is b'.xff.xfe'"):
        load_proto(saved(proto, tmp_path))


def test_tensors_that_share_their_data_do_not_take_more_than_is_allowed(tmp_path: Path) -> None:
    path = external(tmp_path)
    with pytest.raises(
        ValueError, match=r"at most 15 bytes in memory.*what is stored they take 16"
    ):
        read_onnx(path, max_bytes=15)
    read_onnx(path, max_bytes=16)
