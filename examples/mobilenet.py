"""A MobileNetV2-like network from a float checkpoint: load the weights, fine-tune them quantized.

    python -m examples.mobilenet                      # makes a float checkpoint first
    python -m examples.mobilenet --weights float.pth  # a state_dict of your own

The float weights are loaded as always, before the callback sees the module: names of parameters
stay what they are. Depthwise convolutions are the layers that lose most with one scale for a whole
weight; the preset int8 has one per channel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits import Digits, percent, predictions
from lightning_qat import QATCallback, Schedule


def conv(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(cout), nn.ReLU6())


class InvertedResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        hidden, self.adds = cin * expand, stride == 1 and cin == cout
        project = nn.Sequential(nn.Conv2d(hidden, cout, 1, bias=False), nn.BatchNorm2d(cout))
        depthwise = conv(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(conv(cin, hidden, 1), depthwise, project)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.adds else y


class MobileNet(L.LightningModule):
    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        blocks = [InvertedResidual(cin, cout, s) for cin, cout, s in ((8, 16, 2), (16, 16, 1))]
        self.features = nn.Sequential(conv(1, 8, 3), *blocks, conv(16, 64, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.learning_rate)


def train(net: MobileNet, data: Digits, epochs: int, *callbacks: L.Callback) -> None:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(net, data)


def main(
    weights: Path | None = None, epochs: int = 20, out: Path = Path("qat_export")
) -> tuple[float, float]:
    """Accuracy in percent, of the float network and of the quantized one."""
    L.seed_everything(0, verbose=False)
    data = Digits()
    if weights is None:
        net, weights = MobileNet(learning_rate=3e-3), out / "float.pth"
        train(net, data, epochs)
        out.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), weights)

    net = MobileNet(learning_rate=3e-4)
    net.load_state_dict(torch.load(weights, weights_only=True))
    before = percent(predictions(net, data.test_x) == data.test_y)
    schedule = Schedule(freeze_observers=0.5, freeze_batchnorm=0.5)
    qat = QATCallback("int8", schedule, exporters=["fake_quant_onnx"], export_dir=out)
    train(net.train(), data, max(epochs // 5, 1), qat)
    after = percent(predictions(net, data.test_x) == data.test_y)
    print(f"float {before:.2f} %, int8 {after:.2f} %")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", type=Path, help="a float state_dict (default: train one)")
    main(parser.parse_args().weights)
