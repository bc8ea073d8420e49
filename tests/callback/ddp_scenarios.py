"""What processes do for ``test_ddp.py``: one fit after the other, and a line of results each.

Started by torchrun as two nodes of one process each, and for ``test_ddp_nccl.py`` as one node.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, Schedule
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import Net
from tests.export.delivery.odd import Text, hangs

SCHEDULE = Schedule(calibration_batches=2, freeze_observers=2, freeze_batchnorm=2)
EPOCHS = 4
SAMPLES = 32


class Data(L.LightningDataModule):
    """Batches of 8, dealt out in turn: odd samples, five times larger, go to rank 1 of 2."""

    def __init__(self, samples: int = SAMPLES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(samples, 1, 6, 6, generator=generator)
        self.x[1::2] *= 5
        self.y = torch.randint(0, 3, (samples,), generator=generator)

    def _loader(self, scale: float) -> DataLoader[Any]:
        assert self.trainer is not None
        world, rank = self.trainer.world_size, self.trainer.global_rank
        x, y = self.x[rank::world] * scale, self.y[rank::world]
        return DataLoader(TensorDataset(x, y), batch_size=8 // world)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(1.0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(100.0)


class Collectives(L.Callback):
    """Counts the all_reduce calls from Python within each training batch; DDP's own are C++."""

    def __init__(self) -> None:
        self.counted: list[list[int]] = []
        self.inside = False
        self.original = dist.all_reduce

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            self.counted[-1].append(tensor.numel())
        return self.original(tensor, *args, **kwargs)

    def on_train_batch_start(self, *args: object) -> None:
        self.counted.append([])
        self.inside = True


class AfterBatch(L.Callback):
    """Ends the counting; saves a checkpoint in the middle of the run."""

    def __init__(self, collectives: Collectives, folder: Path) -> None:
        self.collectives, self.folder = collectives, folder

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        self.collectives.inside = False

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / f"epoch{trainer.current_epoch}.ckpt")


class OtherPath(Net):
    """Its forward takes another way on one process."""

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.bn(self.conv(x))).mean((2, 3))
        if self.global_rank == 1:
            features = features + features.flip(1)
        logits: Tensor = self.head(features)
        return logits


class PlannedNet(Net):
    """Knows its inputs: learned ranges are parameters that the optimizer must be given."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 6, 6)


class Interrupted:
    """An exporter during which someone presses Ctrl-C, on this process alone."""

    name = "interrupted"

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")


class Failing:
    """An exporter that fails."""

    name = "failing"

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        raise OSError("disk full")


def fit(
    folder: Path,
    nodes: int = 1,
    devices: int = 1,
    accelerator: str = "cpu",
    backend: str = "gloo",
    kind: type[Net] = Net,
    recipe: Any = "int8",
    schedule: Schedule = SCHEDULE,
    samples: int = SAMPLES,
    ckpt: Path | None = None,
    exporters: tuple[Any, ...] = (),
    ddp: dict[str, Any] | None = None,
    timeout: float | None = None,
    trial: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """One run; what there is to say of it."""
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(1, verbose=False)
    net = kind()
    collectives = Collectives()
    dist.all_reduce = collectives
    callback = QATCallback(
        recipe,
        schedule=schedule,
        exporters=exporters,
        export_dir=folder / "out",
        trial_export=trial,
        export_timeout=timeout,
    )
    strategy = DDPStrategy(process_group_backend=backend, **(ddp or {}))
    alone = nodes * devices == 1 and backend == "gloo"
    trainer = L.Trainer(
        **{"max_epochs": EPOCHS, **options},
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="auto" if alone else strategy,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[collectives, callback, AfterBatch(collectives, folder)],
    )
    error = ""
    try:
        trainer.fit(net, Data(samples), ckpt_path=ckpt)
    except (Exception, SystemExit) as caught:
        error = f"{type(caught).__name__}: {caught}"
    dist.all_reduce = collectives.original
    weights = torch.cat([p.detach().flatten() for p in net.parameters()])
    return {
        "ranges": {
            name: (float(q.min_val), float(q.max_val), float(q.batches))
            for name, q in activation_quantizers(net).items()
        },
        "losses": net.losses,
        "weights": weights.tolist(),
        "counted": collectives.counted,
        "delivered": [result.target for result in callback.delivered],
        "error": error,
        "rank": trainer.global_rank,
        "world": trainer.world_size,
    }


LEARNED = {"activation": {"quantizer": "learned"}, "weight": {"quantizer": "learned"}}

CALIBRATED: dict[str, Any] = {
    "recipe": {"weight": {"bits": 2}},
    "schedule": Schedule.calibrate(2),
    "exporters": ("fake_quant_onnx",),
    "max_epochs": 1,
}
"""Two bits, so that there is something to correct."""

SCENARIOS: dict[str, dict[str, Any]] = {
    "default": {"exporters": ("fake_quant_onnx",)},
    "resumed": {},
    "broadcast_buffers off": {"ddp": {"broadcast_buffers": False}},
    "static graph": {"ddp": {"static_graph": True}},
    "accumulated": {"accumulate_grad_batches": 2},
    "uneven last batch": {"samples": SAMPLES - 3},
    # Learned parameters get no gradient from the batches that calibrate.
    "learned": {"recipe": LEARNED, "kind": PlannedNet, "ddp": {"find_unused_parameters": True}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "calibrated": CALIBRATED,
    "other path": {"kind": OtherPath},
    "failing export": {"exporters": (Failing(),), "max_epochs": 3},
    # An exporter of a class that a process of its own imports.
    "hanging export": {
        "exporters": (Text("hangs", hangs),),
        "max_epochs": 1,
        "timeout": 0.2,
        "trial": False,
    },
    # Last: Lightning ignores Ctrl-C from then on.
    "interrupted export": {"exporters": (Interrupted(),), "max_epochs": 1, "trial": False},
}


ONE_NODE = ("default", "learned", "bf16-mixed")


def one_node(out: Path, backend: str, world: int) -> None:
    """Some scenarios on one node; on GPUs with NCCL, else with gloo."""
    accelerator = "gpu" if backend == "nccl" else "cpu"
    options: dict[str, Any] = {"devices": world, "accelerator": accelerator, "backend": backend}
    results = {name: fit(out / name, **options, **SCENARIOS[name]) for name in ONE_NODE}
    (out / f"{results['default']['rank']}.json").write_text(json.dumps(results))


def main(out: Path) -> None:
    """Every scenario in turn."""
    results = {}
    for name, scenario in SCENARIOS.items():
        ckpt = out / "default" / "epoch0.ckpt" if name == "resumed" else None
        results[name] = fit(out / name, nodes=2, ckpt=ckpt, **scenario)
    rank = results["default"]["rank"]
    (out / f"{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        one_node(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
