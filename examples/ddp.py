"""DistributedDataParallel: two processes train one quantized network and agree on its ranges.

    python -m examples.ddp
    python -m examples.ddp --devices 4 --accelerator gpu

Each process sees its own half of every batch; one collective per batch makes the ranges those of
the whole batch. The first process exports.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch

from examples.digits import Digits, DigitsNet
from lightning_qat import QATCallback
from lightning_qat.training.range_sync import activation_quantizers


class SameRanges(L.Callback):
    """Check that the processes agree; for this example, no run needs it."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        ends = [q.max_val for q in activation_quantizers(pl_module).values()]
        mine = torch.stack([end.reshape(()) for end in ends])
        everyones = pl_module.all_gather(mine)
        assert isinstance(everyones, torch.Tensor)
        assert everyones.eq(mine).all(), everyones
        if trainer.is_global_zero:
            print(f"{len(ends)} ranges are the same in {trainer.world_size} processes.")


def main(
    epochs: int = 10, devices: int = 2, accelerator: str = "cpu", out: Path = Path("qat_export")
) -> None:
    L.seed_everything(0, verbose=False)
    qat = QATCallback("int8", exporters=["fake_quant_onnx"], export_dir=out)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=devices,
        strategy="ddp",
        callbacks=[qat, SameRanges()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(DigitsNet(), Digits())
    for result in qat.delivered:  # of the first process
        print(result.agreement)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=2, help="how many processes (default: 2)")
    parser.add_argument("--accelerator", default="cpu", help="cpu (default) or gpu")
    parser.add_argument("--out", type=Path, default=Path("qat_export"), help="folder for the files")
    options = parser.parse_args()
    main(options.epochs, options.devices, options.accelerator, options.out)
