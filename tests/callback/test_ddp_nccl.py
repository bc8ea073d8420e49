"""DistributedDataParallel over NCCL, on one GPU and on two; without GPUs one process on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.callback import ddp_scenarios
from tests.callback.ddp_scenarios import EPOCHS, ONE_NODE, SAMPLES

ROOT = Path(__file__).parents[2]


def run(out: Path, backend: str, world: int) -> list[dict[str, Any]]:
    """What each process found."""
    if backend == "gloo":
        ddp_scenarios.one_node(out, backend, world)
        return [json.loads((out / "0.json").read_text())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(Path(ddp_scenarios.__file__)), str(out), backend, str(world)]
    done = subprocess.run(
        [*torchrun, f"--nproc-per-node={world}", *script],
        cwd=out,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize(
    ("backend", "world"),
    [
        ("gloo", 1),
        pytest.param("nccl", 1, marks=pytest.mark.cuda),
        pytest.param("nccl", 2, marks=pytest.mark.cuda(devices=2)),
    ],
)
def test_every_process_has_the_same_ranges_to_the_bit(
    tmp_path: Path, backend: str, world: int
) -> None:
    found = run(tmp_path, backend, world)
    for name in ONE_NODE:
        results = [result[name] for result in found]
        assert [result["error"] for result in results] == [""] * world
        assert [(result["rank"], result["world"]) for result in results] == [
            (rank, world) for rank in range(world)
        ]
        for result in results:
            assert result["ranges"] == results[0]["ranges"]
            assert result["weights"] == results[0]["weights"]
            assert len(result["losses"]) == EPOCHS * SAMPLES // 8
        if world > 1:
            assert results[0]["losses"] != results[1]["losses"]
        exporters = list(ddp_scenarios.SCENARIOS[name].get("exporters", ()))
        assert [result["delivered"] for result in results] == [exporters, *[[]] * (world - 1)]
    # The range of the input is that of the whole batch.
    alone = ddp_scenarios.fit(tmp_path / "alone")["ranges"]["conv.input_quantizer"]
    assert found[0]["default"]["ranges"]["conv.input_quantizer"] == pytest.approx(alone, rel=1e-6)
