"""Converting and linting a graph takes work in proportion to its nodes, whatever its form.

Work is counted, not timed: calls of functions, Python's and C's, and lines of ours.
``reliability.large_graphs`` has the graphs, and measures seconds for 100,000 nodes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from lightning_qat import convert_qat_model
from lightning_qat_exporters import CannExporter
from lightning_qat_exporters.onnx_files.graph_writer import Names, initializer
from reliability.large_graphs import GRAPHS

NODES = 200
"""Enough for a walk over all nodes at each node to show: it would be half of all work."""
DOUBLED = 2.2


def work_of(function: Callable[[], object]) -> int:
    """Functions called while ``function`` runs, and lines run in our own files."""
    count = 0

    def called(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    def entered(frame: FrameType, event: str, _: object) -> Callable[..., object] | None:
        return line if "lightning_qat" in frame.f_code.co_filename else None

    def line(frame: FrameType, event: str, _: object) -> Callable[..., object]:
        nonlocal count
        count += event == "line"
        return line

    sys.setprofile(called)
    sys.settrace(entered)
    try:
        function()
    finally:
        sys.settrace(None)
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "graph",
    [
        *("matmuls", "convolutions", "moved", "moved_integers", "readers_of_moves"),
        *("diamonds_of_integers", "constants"),
    ],
)
def test_twice_as_many_nodes_take_twice_the_work(graph: str, tmp_path: Path) -> None:
    def convert() -> None:
        convert_qat_model(tmp_path / "model.onnx", tmp_path / "converted")

    def lint() -> None:
        CannExporter().lint(tmp_path / "converted_deploy_model.onnx")

    work: dict[Callable[[], object], list[int]] = {convert: [], lint: []}
    for nodes in (NODES, 2 * NODES):
        onnx.save(GRAPHS[graph](nodes), tmp_path / "model.onnx")
        for step, counts in work.items():
            counts.append(work_of(step))
    for small, large in work.values():
        assert large < DOUBLED * small


@pytest.mark.parametrize("graph", ["moved", "moved_integers"])
def test_a_chain_may_be_longer_than_python_nests_calls(graph: str, tmp_path: Path) -> None:
    onnx.save(GRAPHS[graph](2 * sys.getrecursionlimit()), tmp_path / "model.onnx")
    done = convert_qat_model(tmp_path / "model.onnx", tmp_path / "converted")
    assert len(done.layers) == 1


def test_a_name_that_many_want_is_not_tried_from_its_beginning_each_time() -> None:
    def take(count: int) -> list[str]:
        names = Names()
        return [names.take("layer") for _ in range(count)]

    assert take(3) == ["layer", "layer_1", "layer_2"]
    assert work_of(lambda: take(200)) < DOUBLED * work_of(lambda: take(100))


def test_initializers_of_one_name_and_other_values_are_numbered_and_found_again() -> None:
    def fill(count: int) -> list[str | None]:
        graph = ir.Graph([], [], nodes=[], opset_imports={"": 13})
        arrays = [np.float32([number % 50]) for number in range(count)]
        return [initializer(graph, "w", array).name for array in arrays]

    assert fill(52)[48:] == ["w_48", "w_49", "w", "w_1"]
    assert work_of(lambda: fill(50)) < DOUBLED * work_of(lambda: fill(25))
