"""DistributedDataParallel as Lightning launches it: subprocesses of a script, and spawned."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys
from pathlib import Path
import lightning as L
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net, loader, qat

class Write(L.Callback):
    def __init__(self, out):
        self.out = out

    def on_train_end(self, trainer, pl_module):
        ranges = [float(q.max_val) for q in activation_quantizers(pl_module).values()]
        (self.out / f"ranges{trainer.global_rank}.json").write_text(json.dumps(ranges))

def fit(out, method):
    net, callback = Net(), qat(exporters=["fake_quant_onnx"], export_dir=out, verify=False)
    before = net.head.weight.clone()
    L.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, logger=False,
        strategy=DDPStrategy(start_method=method, process_group_backend="gloo"),
        callbacks=[callback, Write(out)], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(net, loader())
    left = {"float": type(net.head) is nn.Linear, "trained": not before.equal(net.head.weight)}
    if net.global_rank == 0:
        (out / "left.json").write_text(json.dumps(left))

if __name__ == "__main__":
    if "LOCAL_RANK" not in os.environ:  # else it is the second process of the second fit
        fit(Path(sys.argv[1], "spawn"), "spawn")
        os.environ.pop("MASTER_PORT", None)
    fit(Path(sys.argv[1], "popen"), "popen")
"""

METHODS = ("spawn", "popen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one script leaves that trains both ways, a folder for each."""
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("launched")
    for method in METHODS:
        (folder / method).mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.xdist_group("launchers")
@pytest.mark.parametrize("method", METHODS)
def test_a_manifest_tells_where_the_files_are_whoever_launched_the_processes(
    folder: Path, method: str
) -> None:
    out = folder / method
    first, second = (json.loads((out / f"ranges{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    target = json.loads((out / "manifest.json").read_text())["targets"]["fake_quant_onnx"]
    assert (out / target["files"]["model"]["path"]).is_file()
    # Spawned processes train a copy: what comes back to the script are the float weights, in the
    # float module that it had.
    left = json.loads((out / "left.json").read_text())
    assert left == {"float": method != "popen", "trained": True}
