"""A script written for Huawei's AMCT, before and after: change the import, then use Lightning.

    python -m examples.amct_migration

``before`` is such a script with one line changed; the four calls read and write the same files.
``after`` is the same job by the callback, with the same ``retrain.cfg`` and files of the same kind.
Its layers go by the module's names: a configuration that names ``0`` must say ``net.0``.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_qat.amct as amct  # was: import amct_pytorch as amct
from examples.digits import Digits
from lightning_qat import QATCallback

RETRAIN_CFG = """\
batch_num: 2
retrain_data_quant_config: { ulq_quantize: { clip_max_min: { clip_max: 3.0 clip_min: -3.0 } } }
retrain_weight_quant_config: { arq_retrain: { channel_wise: true } }
override_layer_types: {
  layer_type: "Linear"
  retrain_weight_quant_config: { arq_retrain: { channel_wise: false } }
}
"""


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def before(net: nn.Module, data: Digits, epochs: int, out: Path) -> None:
    config, record = out / "config.json", out / "record.txt"
    inputs = data.test_x[:1]
    amct.create_quant_retrain_config(config, net, inputs, out / "retrain.cfg")
    net = amct.create_quant_retrain_model(config, net, record, inputs)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(net(x), y))
            optimizer.step()
    artifact = amct.save_quant_retrain_model(config, net.eval(), record, out / "before", inputs)
    print(*artifact.files.values(), *artifact.notes, sep="\n")


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 3e-3)


def after(net: nn.Module, data: Digits, epochs: int, out: Path) -> None:
    qat = QATCallback(str(out / "retrain.cfg"), exporters=["cann"], export_dir=out)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[qat],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Classifier(net), data)
    print(qat.delivered[0].agreement)


def main(epochs: int = 10, out: Path = Path("qat_export")) -> None:
    L.seed_everything(0, verbose=False)
    out.mkdir(parents=True, exist_ok=True)
    (out / "retrain.cfg").write_text(RETRAIN_CFG, encoding="utf-8")
    data = Digits()
    before(network(), data, epochs, out)
    after(network(), data, epochs, out)


if __name__ == "__main__":
    main()
