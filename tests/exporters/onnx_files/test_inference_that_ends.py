"""Models on which onnx's inference of shapes ends its process are refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper, onnx_cpp2py_export

from lightning_qat_exporters.onnx_files.boundary import inference, inference_process
from lightning_qat_exporters.onnx_files.read import load_proto, read_onnx


def saved(proto: ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def sliced(maker: onnx.NodeProto, x: list[int], step: int = 1, **inits: list[int]) -> ModelProto:
    """``maker`` makes t of x; a Slice along axis 2 reads it."""
    constants = {"start": [0], "end": [1], "axis": [2], "step": [step], **inits}
    cut = helper.make_node("Slice", ["t", "start", "end", "axis", "step"], ["y"])
    graph = helper.make_graph(
        [maker, cut],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(v), name) for name, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


BELOW_ZERO = {
    "declared": (sliced(helper.make_node("Relu", ["x"], ["t"]), [1, 1, -1, 8]), "'x' .* -1"),
    "window": (
        sliced(helper.make_node("MaxPool", ["x"], ["t"], kernel_shape=[9, 1]), [1, 1, 4, 8]),
        "'t' has the shape .1, 1, -4, 8.",
    ),
    "padding": (
        sliced(helper.make_node("Pad", ["x", "p"], ["t"]), [1, 1, 4, 8], p=[0, 0, -5] + [0] * 5),
        "'t' has the shape .1, 1, -1, 8.",
    ),
    "empty and backwards": (sliced(helper.make_node("Relu", ["x"], ["t"]), [1, 1, 0, 8], -1), ""),
}


def onnx_ends_on(path: Path) -> bool:
    """Whether onnx's inference ends its process on a file, as builds with assertions do."""
    infer = "import sys, onnx; onnx.shape_inference.infer_shapes(onnx.load(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", infer, path], capture_output=True)
    return done.returncode != 0


@pytest.mark.parametrize("case", BELOW_ZERO)
def test_a_size_on_which_onnx_ends_the_process_is_refused(case: str, tmp_path: Path) -> None:
    proto, match = BELOW_ZERO[case]
    path = saved(proto, tmp_path)
    if not onnx_ends_on(path):
        read_onnx(path)  # onnx was built without assertions
        return
    for read in (read_onnx, load_proto):
        with pytest.raises(
            ValueError,
            match=rf"A Slice of .* must read sizes of zero.*'y' .Slice. does not.*{match}",
        ):
            read(path)


def single(kind: str, shape: list[int], **attributes: int) -> ModelProto:
    """One node that reads ``x`` and makes ``y0``, ``y1``, ``y2``."""
    outputs = 1 if kind in ("GatherND", "EyeLike") else 3
    inputs = [""] if kind == "EyeLike" else ["x", "i"] if kind == "GatherND" else ["x"]
    node = helper.make_node(
        kind, inputs, [f"y{i}" for i in range(outputs)], f"the {kind}", **attributes
    )
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["r"], "first"), node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("r", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.zeros(0, np.int64), "i")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=8)


DO_NOT_FIT = {
    "Split": single("Split", [4, 4], num_outputs=2),
    "Split into too many": single("Split", [4, 4], num_outputs=2**48),
    "GatherND": single("GatherND", [2, 3], batch_dims=-1),
    "LayerNormalization": single("LayerNormalization", [2, 3], axis=2**31),
    "EyeLike": single("EyeLike", [2, 2], dtype=1),
}


@pytest.mark.parametrize("case", DO_NOT_FIT)
def test_a_node_on_which_onnx_ends_the_process_is_named(case: str, tmp_path: Path) -> None:
    path = saved(DO_NOT_FIT[case], tmp_path)
    if not onnx_ends_on(path):
        pytest.skip("this onnx says what does not fit")
    kind = case.split()[0]
    for read in (read_onnx, load_proto):
        with pytest.raises(ValueError, match=rf"must fit together; on 'the {kind}' \({kind}\)"):
            read(path)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The commands of the processes that try models, of which none runs yet."""
    commands = list[list[str]]()
    begin = subprocess.Popen

    def popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        if inference_process._SERVE in command:
            commands.append(command)
        return begin(command, **options)

    process = inference_process.InferenceProcess()
    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(inference, "_PROCESS", process)
    inference._bytes_end.cache_clear()
    yield commands
    process.close()


def relu_and_slice(width: int) -> bytes:
    return sliced(helper.make_node("Relu", ["x"], ["t"]), [1, 1, 5, width]).SerializeToString()


@pytest.mark.parametrize("with_packages", [False, True])
def test_the_process_that_tries_a_model_needs_only_the_c_code_of_onnx_or_all_of_it(
    with_packages: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: list[list[str]]
) -> None:
    path = saved(BELOW_ZERO["declared"][0], tmp_path)
    if not onnx_ends_on(path):
        pytest.skip("onnx was built without assertions")
    if with_packages:
        gone = str(tmp_path / "gone.so")
        monkeypatch.setattr(onnx_cpp2py_export, "__file__", gone)
    else:
        begin = subprocess.Popen
        monkeypatch.setattr(
            subprocess,
            "Popen",  # no installed package can be imported in it
            lambda command, **o: begin([command[0], "-I", "-S", *command[1:]], **o),
        )
    with pytest.raises(ValueError, match="must read sizes of zero"):
        read_onnx(path)
    read_onnx(saved(sliced(helper.make_node("Relu", ["x"], ["t"]), [1, 1, 5, 7]), tmp_path))
    assert len(begun) > 1


def test_one_process_tries_many_models_and_is_replaced_when_it_ends(
    tmp_path: Path, begun: list[list[str]]
) -> None:
    process = inference._PROCESS
    ends = BELOW_ZERO["declared"][0]
    for width in range(2, 8):
        assert not process.ends_on(relu_and_slice(width))
    assert len(begun) == 1
    if not onnx_ends_on(saved(ends, tmp_path)):
        pytest.skip("onnx was built without assertions")
    assert process.ends_on(ends.SerializeToString())
    assert len(begun) == 2  # the first had tried others, so a new one had to say it again
    assert not process.ends_on(relu_and_slice(8))
    assert len(begun) == 3


def test_a_process_that_was_killed_is_no_fault_of_the_model(begun: list[list[str]]) -> None:
    process = inference._PROCESS
    assert not process.ends_on(relu_and_slice(2))
    assert process._process is not None
    process._process.kill()
    process._process.wait()
    assert not process.ends_on(relu_and_slice(3))
    assert len(begun) == 2


FORKS = """
import os, sys
from lightning_qat_exporters.onnx_files.boundary.inference_process import InferenceProcess

process, model = InferenceProcess(), sys.stdin.buffer.read()
assert not process.ends_on(model)
of_parent = process._process
child = os.fork()
if child == 0:
    right = not process.ends_on(model) and process._process is not of_parent
    if right:
        process.close()
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert not process.ends_on(model)
assert process._process is of_parent
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_a_process_of_its_own() -> None:
    """In an interpreter of its own, as threads of others do not survive a fork."""
    done = subprocess.run([sys.executable, "-c", FORKS], input=relu_and_slice(2), check=False)
    assert done.returncode == 0


def test_an_interpreter_that_cannot_be_started_refuses_nothing(
    monkeypatch: pytest.MonkeyPatch, begun: list[list[str]]
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/interpreter")
    assert not inference._PROCESS.ends_on(b"anything")


def test_a_file_that_is_read_again_is_tried_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(sliced(helper.make_node("Relu", ["x"], ["t"]), [1, 1, 5, 7]), tmp_path)
    tried = list[bytes]()

    def survives(model: bytes) -> bool:
        tried.append(model)
        return False

    monkeypatch.setattr(inference._PROCESS, "ends_on", survives)
    inference._bytes_end.cache_clear()
    for _ in range(3):
        read_onnx(path)
    assert len(tried) == 1


def test_a_slice_of_known_sizes_is_read(tmp_path: Path) -> None:
    for shape in ([1, 1, 4, 8], [1, 1, 0, 8]):
        read_onnx(saved(sliced(helper.make_node("Relu", ["x"], ["t"]), shape), tmp_path))
