"""DistributedDataParallel: two nodes of one process each, gloo, other data on each.

All scenarios run in one pair of processes (see ``ddp_scenarios.py``); the tests read off what they
left.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat import Schedule
from tests.callback import ddp_scenarios
from tests.callback.ddp_scenarios import EPOCHS, SAMPLES

ROOT = Path(__file__).parents[2]
BATCHES = SAMPLES // 8
FREEZE = 2 * BATCHES
"""The first batch that is no longer observed: ranges freeze with the third epoch."""

# Other workers have better to do than to wait for the two processes.
pytestmark = pytest.mark.xdist_group("two nodes")

Results = tuple[dict[str, Any], dict[str, Any]]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(out: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    port = free_port()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = [str(Path(ddp_scenarios.__file__)), str(out)]
    logs = [(out / f"{rank}.log").open("w") for rank in (0, 1)]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"--node-rank={rank}", *script],
            cwd=out,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        int_repr = [node.wait(timeout=300) for node in nodes]
    finally:
        for node, log in zip(nodes, logs, strict=True):
            node.kill()
            log.close()
    texts = "\n".join((out / f"{rank}.log").read_text()[-3000:] for rank in (0, 1))
    assert int_repr == [0, 0], texts


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both processes found; they run once, even if pytest-xdist minds no groups."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    out = shared / "ddp"
    try:
        out.mkdir()
    except FileExistsError:
        deadline = time.monotonic() + 330
        while not (out / "done").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
    else:
        try:
            run(out)
        finally:
            (out / "done").touch()
    first, second = (json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process on the same batches, concatenated."""
    found: dict[str, Any] = json.loads(
        json.dumps(ddp_scenarios.fit(tmp_path_factory.mktemp("alone")))
    )
    return found


TRAINED = [
    *("default", "broadcast_buffers off", "static graph", "accumulated", "uneven last batch"),
    "bf16-mixed",
]


@pytest.mark.parametrize("name", TRAINED)
def test_all_processes_have_the_same_ranges_and_weights(results: Results, name: str) -> None:
    first, second = (result[name] for result in results)
    assert (first["error"], second["error"]) == ("", "")
    assert first["ranges"] == second["ranges"]
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"]
    batches = {seen for _, _, seen in first["ranges"].values()}
    assert batches == {FREEZE}


@pytest.mark.parametrize("name", ["default", "broadcast_buffers off", "static graph"])
def test_the_range_of_the_input_is_that_of_one_process_on_the_whole_batch(
    results: Results, alone: dict[str, Any], name: str
) -> None:
    # To the bit; later layers differ by what batch norm makes of half a batch.
    found = results[0][name]["ranges"]
    assert found["conv.input_quantizer"] == alone["ranges"]["conv.input_quantizer"]
    assert found["head.input_quantizer"] != alone["ranges"]["head.input_quantizer"]


def test_the_range_is_per_batch_not_per_optimizer_step(
    results: Results, alone: dict[str, Any]
) -> None:
    found = results[0]["accumulated"]["ranges"]
    assert found["conv.input_quantizer"] == alone["ranges"]["conv.input_quantizer"]


@pytest.mark.parametrize("name", TRAINED)
def test_one_collective_per_observing_batch_and_none_once_frozen(
    results: Results, name: str
) -> None:
    for result in results:
        counted = result[name]["counted"]
        numbers = 2 * len(result[name]["ranges"])
        assert len(counted) == EPOCHS * BATCHES
        # The first batch agrees on the plan as well.
        assert counted[0] == [1, numbers]
        assert counted[1:FREEZE] == [[numbers]] * (FREEZE - 1)
        assert counted[FREEZE:] == [[]] * (EPOCHS * BATCHES - FREEZE)


def test_learned_ranges_start_alike_and_learn_alike(results: Results) -> None:
    first, second = (result["learned"] for result in results)
    assert (first["error"], second["error"]) == ("", "")
    # Scales and lower ends are among the weights.
    assert first["ranges"] == second["ranges"]
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"]
    # Two batches calibrate; then gradients move the scales, which DDP averages itself, and while
    # ranges are observed, each of the first batches may widen them.
    assert {seen for _, _, seen in first["ranges"].values()} == {FREEZE}
    numbers = 2 * len(first["ranges"])
    assert first["counted"][:FREEZE] == [[numbers]] * FREEZE
    assert first["counted"][FREEZE:] == [[]] * (EPOCHS * BATCHES - FREEZE)


def test_a_network_that_is_only_calibrated_is_that_of_one_process_on_the_whole_batches(
    results: Results, tmp_path: Path
) -> None:
    first, second = (result["calibrated"] for result in results)
    assert (first["error"], second["error"]) == ("", "")
    assert first["weights"] == second["weights"]
    assert first["ranges"] == second["ranges"]
    assert first["delivered"] == ["fake_quant_onnx"]
    whole = ddp_scenarios.fit(tmp_path / "whole", **ddp_scenarios.CALIBRATED)
    only_ranges = Schedule.calibrate(2, correct_biases=False)
    uncorrected = ddp_scenarios.fit(
        tmp_path / "uncorrected", **{**ddp_scenarios.CALIBRATED, "schedule": only_ranges}
    )
    assert (whole["error"], uncorrected["error"]) == ("", "")
    shared, own, before = (
        torch.tensor(result["weights"]) for result in (first, whole, uncorrected)
    )
    # Means are those over all samples; ratios of variances are averaged over parts of a batch.
    assert (shared - own).norm() < 0.05 * (before - own).norm()


def test_a_resumed_run_is_the_uninterrupted_one_on_every_process(results: Results) -> None:
    for result in results:
        whole, resumed = result["default"], result["resumed"]
        assert resumed["losses"] == whole["losses"][BATCHES:]
        assert resumed["ranges"] == whole["ranges"]
        assert resumed["weights"] == whole["weights"]


def test_only_the_first_process_exports(results: Results) -> None:
    first, second = results
    assert first["default"]["delivered"] == ["fake_quant_onnx"]
    assert second["default"]["delivered"] == []


def test_an_export_that_fails_is_an_error_on_every_process(results: Results) -> None:
    first, second = (result["failing export"]["error"] for result in results)
    assert "1 of 1 exports failed" in first
    assert "\nfailing: OSError: disk full\nSaved: the converted model is" in first
    assert second.startswith("RuntimeError: The export on the first process failed: 1 of 1")


def test_an_export_that_hangs_is_ended_and_told_to_every_process(results: Results) -> None:
    first, second = (result["hanging export"]["error"] for result in results)
    assert "\nhangs: TimeoutError: the export took longer than its timeout of 0.2 s" in first
    assert "\nhangs: TimeoutError: the export took longer than its timeout of 0.2 s" in second


def test_ctrl_c_during_the_export_on_one_process_ends_all(results: Results) -> None:
    first, second = (result["interrupted export"]["error"] for result in results)
    assert first.startswith("SystemExit")
    assert second == "RuntimeError: The export on the first process failed: KeyboardInterrupt"


def test_processes_that_plan_other_tensors_are_told_so_all_of_them(results: Results) -> None:
    for result in results:
        assert "Every process must quantize the same tensors" in result["other path"]["error"]
        assert "pass QATCallback(example_inputs=...)" in result["other path"]["error"]
        assert len(result["other path"]["losses"]) == 1
