"""A student of 4 bits learns from a float teacher in the same LightningModule.

    python -m examples.distillation

The teacher is excluded from the recipe and stays float. (What ``forward`` never runs would be left
float in any case; to say so keeps the report short.) It is in no exported file.
"""

from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import Digits, DigitsNet, percent, predictions
from lightning_qat import QATCallback, Recipe


class Distilled(L.LightningModule):
    """Cross entropy, and the divergence from the teacher's softened answers (Hinton et al.)."""

    def __init__(self, teacher: nn.Module, temperature: float = 4.0) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.student = copy.deepcopy(teacher).train()
        self.teacher = teacher.eval().requires_grad_(False)
        self.temperature = temperature

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.student(x)
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        logits, t = self(x), self.temperature
        with torch.no_grad():
            soft = F.softmax(self.teacher(x) / t, -1)
        imitation = F.kl_div(F.log_softmax(logits / t, -1), soft, reduction="batchmean") * t**2
        loss = 0.3 * F.cross_entropy(logits, y) + 0.7 * imitation
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), 1e-3)


def train(net: L.LightningModule, data: Digits, epochs: int, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(net, data)


def main(epochs: int = 20, out: Path = Path("qat_export")) -> tuple[float, float]:
    """Accuracy in percent, of the float teacher and of the quantized student."""
    L.seed_everything(0, verbose=False)
    data, teacher = Digits(), DigitsNet()
    train(teacher, data, epochs)
    before = percent(predictions(teacher, data.test_x) == data.test_y)

    net = Distilled(teacher)
    recipe = Recipe.load({"preset": "w4a4", "exclude": ["teacher"]})
    qat = QATCallback(recipe, exporters=["fake_quant_onnx"], export_dir=out)
    train(net, data, max(epochs // 2, 1), qat)
    after = percent(predictions(net, data.test_x) == data.test_y)
    print(f"float teacher {before:.2f} %, student of 4 bits {after:.2f} %")
    return before, after


if __name__ == "__main__":
    main()
