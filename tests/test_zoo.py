"""The zoo: eight architectures that we did not write come through, and the counts are right.

``python -m benchmarks.zoo`` runs all of them; these need nothing but transformers.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import zoo
from benchmarks.row_process import RowFailed
from benchmarks.zoo_models import all_architectures
from benchmarks.zoo_models.coverage import Products, qdq_products
from benchmarks.zoo_models.row import stages
from benchmarks.zoo_models.table import table
from benchmarks.zoo_models.unsaid import unsaid

WRITTEN = ("crnn", "tcn", "dlrm", "superres", "yolo")
LANGUAGE = ("bert", "gpt2", "t5")
TINY = (
    *(f"written/{name}" for name in WRITTEN),
    *(f"transformers/{name}" for name in LANGUAGE),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the stages of an architecture found, by stage; each architecture runs once."""
    known: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name.startswith("transformers"):
            pytest.importorskip("transformers")
        if name not in known:
            folder = tmp_path_factory.mktemp("files")
            targets = ("fake_quant_onnx", "cann")
            known[name] = dict(stages(all_architectures()[name], targets, folder))
        return known[name]

    return run


@pytest.mark.parametrize("name", TINY)
def test_an_architecture_comes_through_and_says_what_stays_float(name: str, found: Any) -> None:
    rows = found(name)
    for target in ("fake_quant_onnx", "cann"):
        assert "error" not in rows[target], rows[target]["error"]
        assert rows[target]["differences"] == []
        assert rows[target]["integer_products"] > 0
        assert rows[target]["unsaid"] == []
    file, moves = rows["fake_quant_onnx"], rows["convert"]["moves"]
    assert file["float_products"] == []
    assert file["steps"]["onnxruntime, no optimizations"] <= max(1.0, 2.0 * moves)


def test_names_are_unique_and_more_than_sixty_architectures_are_there() -> None:
    names = list(all_architectures())
    assert len(names) == len(set(names)) >= 84


def _graph(quantized: bool) -> onnx.ModelProto:
    """``x @ w`` with an integer weight; ``x`` passes integers, or does not."""
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["real_w"])]
    x = "x"
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
            helper.make_node("Transpose", ["d"], ["t"], perm=[0, 1]),
        ]
        x = "t"
    nodes.append(helper.make_node("MatMul", [x, "real_w"], ["y"], name="product"))
    stored = {
        "w": np.ones((2, 2), np.int8),
        "s": np.array(0.5, np.float32),
        "z": np.array(0, np.int8),
    }
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])


@pytest.mark.parametrize(("quantized", "expected"), [(True, (1, ())), (False, (0, ("product",)))])
def test_a_product_is_integer_if_both_of_its_operands_come_from_integers(
    quantized: bool, expected: tuple[int, tuple[str, ...]], tmp_path: Path
) -> None:
    onnx.save(_graph(quantized), tmp_path / "net.onnx")
    assert qdq_products(tmp_path / "net.onnx") == Products(*expected)


def _lines(name: str) -> list[dict[str, Any]]:
    file = {
        "differences": [],
        "unsaid": ["head"],
        "float_products": ["head"],
        "integer_products": 3,
        "optimized_float": 1,
        "steps": {"onnxruntime, no optimizations": 0.5},
        "notes": [],
        "seconds": 2.0,
    }
    prepare = {"layers": 4, "tensors": 9, "skipped": ["head (Linear): excluded"], "left_float": []}
    return [
        {"name": name, "stage": "build", "seconds": 1.0, "parameters": 5},
        {"name": name, "stage": "float step", "step": 0.1},
        {"name": name, "stage": "prepare", **prepare},
        {"name": name, "stage": "train", "step": 0.2},
        {"name": name, "stage": "convert", "moves": 0.0, "seconds": 3.0},
        {"name": name, "stage": "fake_quant_onnx", **file},
        {"name": name, "stage": "cann", "error": "UnsupportedByTarget: why"},
        {"name": name, "stage": "end", "seconds": 9.0},
    ]


def test_the_table_tells_what_is_float_what_fails_and_what_nothing_says() -> None:
    text = table({"a/b": _lines("a/b")})
    assert "| a/b | 4 | 9 | 1, 0 | 3/4 | 0.5 | 0.0 | no |" in text
    assert "cann fails: UnsupportedByTarget: why" in text
    assert "head (Linear): excluded" in text
    assert "fake_quant_onnx: head is float and nothing says so" in text
    assert "optimized session: 0" in text


def test_a_run_goes_on_where_the_last_one_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "zoo.jsonl"
    finished = "\n".join(json.dumps(line) for line in _lines("written/tcn"))
    begun = json.dumps({"name": "written/yolo", "stage": "build", "seconds": 1.0})
    results.write_text(f"{finished}\n{begun}\n")
    run = list[str]()

    def row(name: str, _targets: Any, _limit: float) -> list[dict[str, Any]]:
        run.append(name)
        return [{"name": name, "stage": s, "seconds": 0.0} for s in ("build", "end")]

    monkeypatch.setattr(zoo, "row", row)
    only = ["--results", str(results), "--only", "written/tcn", "written/yolo"]
    assert zoo.main(only) == 0
    assert run == ["written/yolo"]
    assert set(zoo.read(results)) == {"written/tcn", "written/yolo"}
    with pytest.raises(SystemExit):
        zoo.main(["--only", "nothing/*"])
    assert "no architecture matches" in capsys.readouterr().err


def test_a_row_that_dies_keeps_what_it_found_and_says_in_which_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dies:
        def __init__(self, _target: Any, *_arguments: Any) -> None:
            self.answers: Iterator[dict[str, Any]] = iter([{"stage": "build", "seconds": 1.0}])

        def answer(self, _until: float) -> dict[str, Any]:
            try:
                return next(self.answers)
            except StopIteration:
                raise RowFailed("not ready in time", "last line") from None

        def stop(self) -> None: ...

    monkeypatch.setattr(zoo, "RowProcess", Dies)
    build, failed, end = zoo.row("written/tcn", ("cann",), 1.0)
    assert (build["stage"], end["stage"]) == ("build", "end")
    assert (failed["stage"], failed["error"]) == ("float step", "not ready in time")
    assert zoo.failures([build, failed, end]) == ["float step: not ready in time"]


@pytest.mark.parametrize(
    ("floats", "said", "left"),
    [
        (["a.b/MatMul"], "a.b: its input is float.", []),
        (["a.b/MatMul"], "a.bc and c.a.b stay float.", ["a.b/MatMul"]),
        (["FULLY_CONNECTED fc_1"], "fc: computed in float on its integer weight.", []),
        (["/MatMul"], "'/MatMul': its weight is no constant.", []),
        (["/MatMul"], "something else.", ["/MatMul"]),
        (["BATCH_MATMUL x;1", "BATCH_MATMUL x;2"], "matmul: 2 planned on integers, ...", []),
        (["BATCH_MATMUL x;1", "BATCH_MATMUL x;2"], "3 ADD, 1 BATCH_MATMUL.", ["BATCH_MATMUL x;2"]),
    ],
)
def test_a_float_product_is_said_by_its_module_or_by_a_count(
    floats: list[str], said: str, left: list[str]
) -> None:
    assert unsaid(floats, said) == left
