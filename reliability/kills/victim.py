"""The run that is killed: training with checkpoints, validation, and exports to two targets."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_qat import QATCallback, Schedule, export, prepare
from lightning_qat.convert.convert import convert_untrained

EPOCHS, BATCHES = 3, 8
OUT, SAVED = "out", "saved"
TARGETS = ["fake_quant_onnx", "cann"]


class Victim(L.LightningModule):
    """A small network whose batch depends on the epoch and the batch's index alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        self.example_input_array = torch.zeros(2, 1, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images (batch, 1, 6, 6)."""
        logits: Tensor = self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))
        return logits

    def _loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 1, 6, 6, generator=generator)
        return F.cross_entropy(self(x), torch.randint(0, 3, (8,), generator=generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A step on the batch of this index."""
        return self._loss(1000 * self.current_epoch + batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss."""
        self.log("val_loss", self._loss(10_000 + batch_idx))

    def configure_optimizers(self) -> Any:
        """Momentum, so that a checkpoint must bring the optimizer's state."""
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Told(L.Callback):
    """Says when the exports begin."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self.tell = tell

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Training is over."""
        self.tell()


def import_all() -> None:
    """Import what a run imports, by exporting once, so that its forks need not."""
    with tempfile.TemporaryDirectory() as folder:
        module = Victim()
        inputs = torch.zeros(2, 1, 6, 6)
        prepare(module, "int8", inputs)
        model = convert_untrained(module, inputs)
        for target in TARGETS:
            export(model, target, Path(folder, target))


def train(folder: Path, exporting: Callable[[], None] = lambda: None) -> None:
    """Train and export; go on from the last checkpoint if there is one.

    Args:
        folder: Checkpoints go to ``saved``, files to ``out``.
        exporting: Called when the exports begin.
    """
    for name in ("lightning.pytorch", "lightning", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    L.seed_everything(1, verbose=False)
    last = folder / SAVED / "last.ckpt"
    saves = ModelCheckpoint(
        folder / SAVED,
        save_last=True,
        save_top_k=-1,
        # Never in the last batch of an epoch but the last: resumed from there, and once more within
        # the next epoch, Lightning 2.6.6 trains too many steps, also without QAT.
        every_n_train_steps=3,
        enable_version_counter=False,
    )
    qat = QATCallback(
        schedule=Schedule(calibration_batches=4, freeze_observers=0.5, freeze_batchnorm=0.75),
        exporters=TARGETS,
        export_dir=folder / OUT,
    )
    trainer = L.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Told(exporting), saves, qat],
    )
    data: Any = DataLoader(list(range(BATCHES)))  # type: ignore[arg-type]
    trainer.fit(Victim(), data, data, ckpt_path=last if last.exists() else None)
    trainer.save_checkpoint(folder / SAVED / "end.ckpt")
