"""A residual network from nothing to the files of three targets, each compared with the model.

    python -m examples.residual_cnn

Nothing in the network knows of quantization. Both operands of an addition, the pool and the output
are quantized as well as the layers, so that an integer target computes everything in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import Digits
from lightning_qat import QATCallback


class Block(nn.Module):
    """Two convolutions and a shortcut, which is a convolution where the shape changes."""

    def __init__(self, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or cin != cout:
            conv = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(cout))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNet(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 1, 8, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        )
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 3e-3)


def main(
    epochs: int = 12,
    out: Path = Path("qat_export"),
    targets: Sequence[str] = ("fake_quant_onnx", "cann", "tflite"),
) -> float:
    """Train, export; the accuracy on the test images in percent."""
    L.seed_everything(0, verbose=False)
    data, net = Digits(), ResidualNet()
    qat = QATCallback("int8", exporters=targets, export_dir=out)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[qat],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(net, data)
    assert qat.report is not None
    print(qat.report.joins)  # which tensor is quantized where, and who reads it
    for result in qat.delivered:
        print(result.agreement)
    with torch.no_grad():
        hits = net.eval()(data.test_x).argmax(1) == data.test_y
    accuracy = 100 * float(hits.float().mean())
    print(f"int8: {accuracy:.2f} % of the test images. The files are in {out}.")
    return accuracy


if __name__ == "__main__":
    main()
