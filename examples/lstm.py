"""An LSTM on a sequence task: trained in float, fine-tuned quantized, exported for two targets.

    python -m examples.lstm

The adding problem: of a sequence of numbers two are marked, and the target is their sum. A layer's
input has one range for all time steps and so has its hidden state. Files have the length of the
example's sequence; the batch stays dynamic.
"""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback

STEPS = 10


def sequences(count: int, seed: int) -> TensorDataset:
    """Numbers and marks ``(count, STEPS, 2)``, sums ``(count, 1)``; one mark in each half."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, STEPS, generator=generator)
    marks = torch.zeros(count, STEPS)
    for start in (0, STEPS // 2):
        places = torch.randint(start, start + STEPS // 2, (count, 1), generator=generator)
        marks.scatter_(1, places, 1.0)
    return TensorDataset(torch.stack((numbers, marks), -1), (numbers * marks).sum(1, keepdim=True))


class Adder(L.LightningModule):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.learning_rate = 1e-2
        self.example_input_array = torch.zeros(2, STEPS, 2)
        self.lstm = nn.LSTM(2, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        total: Tensor = self.head(output[:, -1])
        return total

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor]) -> None:
        self.log("squared error", F.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def main(
    epochs: int = 20, samples: int = 4096, out: Path = Path("qat_export")
) -> tuple[float, float]:
    """The squared error on fresh sequences, of the float network and of the quantized one."""
    L.seed_everything(0, verbose=False)
    train = DataLoader(sequences(samples, seed=0), batch_size=64, shuffle=True)
    test = DataLoader(sequences(1024, seed=1), batch_size=256)
    net = Adder()

    def fit(epochs: int, *callbacks: L.Callback) -> float:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            callbacks=[*callbacks],
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
        )
        trainer.fit(net, train)
        return trainer.test(net, test, verbose=False)[0]["squared error"]

    # Start from a trained network: an LSTM's values grow while it learns, and ranges follow late.
    before = fit(epochs)
    net.learning_rate = 1e-3
    qat = QATCallback("int8", exporters=["fake_quant_onnx", "cann"], export_dir=out)
    after = fit(max(epochs // 4, 1), qat)
    for result in qat.delivered:
        print(result.agreement)
    print(f"squared error: float {before:.5f}, int8 {after:.5f} (remembering nothing: 0.167)")
    return before, after


if __name__ == "__main__":
    main()
