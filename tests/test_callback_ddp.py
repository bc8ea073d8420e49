"""QATCallback under DistributedDataParallel: two processes, gloo, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = '''
import json, sys
from pathlib import Path
import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset
from lightning_qat import QATCallback, Schedule
from lightning_qat.phases import activation_quantizers
from tests.models import TinyModule

class Data(L.LightningDataModule):
    """Batches of 8, dealt out in turn: odd samples, five times larger, go to rank 1 of 2."""

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 1, 8, 8, generator=generator)
        x[1::2] *= 5
        y = torch.randint(0, 3, (32,), generator=generator)
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return DataLoader(TensorDataset(x[rank::world], y[rank::world]), batch_size=8 // world)

def main(out: Path, devices: int) -> None:
    L.seed_everything(1, verbose=False)
    net = TinyModule()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=devices, logger=False,
        use_distributed_sampler=False,
        strategy=DDPStrategy(process_group_backend="gloo") if devices > 1 else "auto",
        callbacks=[QATCallback(
            schedule=Schedule(calibration_batches=2, freeze_observers=1, freeze_batchnorm=1),
            exporters=["fake_quant_onnx", "cann"], export_dir=out,
        )],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(net, Data())
    ranges = [(float(q.min_val), float(q.max_val)) for q in activation_quantizers(net).values()]
    (out / f"ranges{trainer.global_rank}.json").write_text(json.dumps(ranges))

main(Path(sys.argv[1]), int(sys.argv[2]))
'''


def fit(out: Path, devices: int) -> list[list[list[float]]]:
    out.mkdir()
    root = Path(__file__).parents[1]
    script = out / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(devices)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"ranges{rank}.json").read_text()) for rank in range(devices)]


def test_two_processes_agree_on_the_range_of_the_whole_batch_and_export_once(
    tmp_path: Path,
) -> None:
    first, second = fit(tmp_path / "two", 2)
    (single,) = fit(tmp_path / "one", 1)
    assert first == second
    # The first layer sees the data themselves, so its range is the single process's to the bit;
    # later layers differ by what batch norm makes of half a batch.
    assert first[0] == single[0]
    assert first[1] != single[1]
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"manifest.json", "tinymodule_qdq.onnx", "tinymodule_deploy_model.onnx"} <= names
    targets = json.loads((tmp_path / "two" / "manifest.json").read_text())["targets"]
    assert all(target["agreement"]["parameters_equal"] for target in targets.values())
