"""``lightning-qat run``: deploy, QDQ and float models on arrays, and what it says is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lightning_qat import cli
from lightning_qat.export.protocol import Array
from lightning_qat_exporters import CannExporter
from tests.exporters.cann.amct_goldens import load_case

Command = Callable[..., str]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command on arrays; returns what it prints, as the exit code says where."""

    def command(model: Path, arrays: dict[str, Array], *, code: int = 0) -> str:
        np.savez(tmp_path / "in.npz", **arrays)  # type: ignore[arg-type]
        arguments = ["--inputs", str(tmp_path / "in.npz"), "--out", str(tmp_path / "out.npz")]
        assert cli.main(["run", str(model), *arguments]) == code
        printed = capsys.readouterr()
        assert (printed.out if code else printed.err) == ""
        return printed.err if code else printed.out

    return command


def model_file(folder: Path, *nodes: onnx.NodeProto, **constants: Array) -> Path:
    """A model of ``x`` [?, 2] and ``n`` int64 []; its outputs are ``y`` and ``file``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2]),
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
        ],
        [helper.make_empty_tensor_value_info(name) for name in ("y", "file")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    path = folder / "net.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path
    )
    return path


def qdq_file(folder: Path) -> Path:
    """Quantize ``x`` in steps of 0.5; multiply ``n`` by 2."""
    return model_file(
        folder,
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        helper.make_node("Add", ["n", "n"], ["file"]),
        s=np.array(0.5, np.float32),
        z=np.array(0, np.int8),
    )


def test_a_deploy_model_of_amct_gives_its_simulations_outputs(
    command: Command, tmp_path: Path
) -> None:
    case = load_case("conv_a8w4")
    (output,) = (value.name for value in case.deploy.graph.output)
    assert command(case.deploy_path, case.inputs) == (
        f"{output}: float32 [2, 10]\noutputs: {tmp_path / 'out.npz'}\n"
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")[output], case.outputs[0])


def test_a_qdq_model_is_computed_as_it_is(command: Command, tmp_path: Path) -> None:
    x = np.array([[0.3, 0.2], [100.0, -0.8]], np.float32)
    printed = command(qdq_file(tmp_path), {"x": x, "n": np.array(3)})
    assert printed.splitlines()[:2] == ["y: float32 [2, 2]", "file: int64 []"]
    outputs = np.load(tmp_path / "out.npz")
    # 0.6, 0.4, 200 and -1.6 steps
    assert outputs["y"].tolist() == [[0.5, 0.0], [63.5, -1.0]]
    assert outputs["file"] == 6


def test_all_that_does_not_fit_is_in_one_message(command: Command, tmp_path: Path) -> None:
    path = qdq_file(tmp_path)
    wrong = {"X": np.zeros(1), "x": np.zeros((4, 2))}
    assert command(path, wrong, code=2).splitlines() == [
        f"lightning-qat run: The inputs must be those of {str(path)!r}:",
        "  'x' must be float32 [?, 2]; got float64 [4, 2]: array.astype('float32') changes the "
        "type",
        "  'n' must be int64 []; it is missing",
        "  'X' is not an input of the model",
    ]
    wrong = {"x": np.zeros((4, 3), np.float32), "n": np.array([1])}
    assert command(path, wrong, code=2).splitlines()[1:] == [
        "  'x' must be float32 [?, 2]; got float32 [4, 3]",
        "  'n' must be int64 []; got int64 [1]",
    ]
    assert not (tmp_path / "out.npz").exists()


def test_the_remedy_of_the_message_works(command: Command, tmp_path: Path) -> None:
    arrays = {"x": np.zeros((4, 2)).astype("float32"), "n": np.array(1)}
    command(qdq_file(tmp_path), arrays)


def test_what_onnx_runtime_refuses_is_one_message(command: Command, tmp_path: Path) -> None:
    nodes = (helper.make_node("NoSuchOp", ["x"], ["y"]), helper.make_node("Abs", ["n"], ["file"]))
    message = command(model_file(tmp_path, *nodes), {}, code=2)
    assert message.startswith("lightning-qat run: ONNX Runtime cannot run ")
    assert "NoSuchOp" in message
    nodes = (helper.make_node("AscendQuant", ["x"], ["y"], "quant"), nodes[1])
    message = command(model_file(tmp_path, *nodes), {}, code=2)
    assert "'quant' (AscendQuant): it must have a scale" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"must be an .npz file with the inputs at '.*in'; no file is there"),
        (b"text", r"The inputs must be a file of named arrays, as np.savez.* cannot be read"),
        (b"", r"cannot be read"),
        (b"PK\x03\x04broken", r"cannot be read"),
    ],
)
def test_inputs_that_are_no_npz_file_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "in"
    if content is not None:
        path.write_bytes(content)
    arguments = ["--inputs", str(path), "--out", str(tmp_path / "out.npz")]
    assert cli.main(["run", str(qdq_file(tmp_path)), *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_array_without_a_name_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "in.npy", np.zeros(1))
    arguments = ["--inputs", str(tmp_path / "in.npy"), "--out", str(tmp_path / "out.npz")]
    assert cli.main(["run", str(qdq_file(tmp_path)), *arguments]) == 2
    assert "is one array without a name" in capsys.readouterr().err


def test_python_runs_a_file_at_a_path_of_either_kind(tmp_path: Path) -> None:
    arrays = {"x": np.zeros((1, 2), np.float32), "n": np.array(1)}
    for path in (qdq_file(tmp_path), str(qdq_file(tmp_path))):
        assert CannExporter().run_file(path, arrays)["file"] == 2
