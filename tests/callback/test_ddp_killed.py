"""A process of a DDP run is killed: the other one ends soon, with an error that says so."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, time, warnings
warnings.simplefilter("ignore")
import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from lightning_qat import QATCallback
from tests.callback.ddp_scenarios import Data
from tests.callback.tiny import Net

class Slow(L.Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 4:
            print("step", flush=True)
        time.sleep(0.2)

qat = QATCallback(exporters=["fake_quant_onnx"], export_dir=sys.argv[1], trial_export=False)
L.Trainer(
    max_epochs=1000, accelerator="cpu", devices=1, num_nodes=2, logger=False,
    strategy=DDPStrategy(process_group_backend="gloo"), use_distributed_sampler=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    callbacks=[qat, Slow()],
).fit(Net(), Data())
"""


def start(rank: int, port: int, out: Path) -> "subprocess.Popen[str]":
    """One process, with the environment that torchrun gives it."""
    environment = {
        **os.environ,
        **{"RANK": str(rank), "GROUP_RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
        **{"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        **{"TORCHELASTIC_RUN_ID": "killed", "OMP_NUM_THREADS": "1"},
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out)],
        **{"cwd": ROOT, "env": environment, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )


@pytest.mark.xdist_group("two nodes")
def test_when_one_process_is_killed_the_other_ends_with_an_error(tmp_path: Path) -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    first, second = (start(rank, port, tmp_path / "out") for rank in (0, 1))
    try:
        for process in (first, second):
            assert process.stdout is not None
            assert process.stdout.readline() == "step\n"
        second.kill()
        # It took 6 s on two busy cores; gloo itself notices at once.
        _, text = first.communicate(timeout=120)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert first.returncode == 1
    assert "Connection" in text
    assert "remote worker" in text or "peer" in text
    assert list((tmp_path / "out").iterdir()) == []
