"""The main job on real data: train in float, fine-tune quantized, export, compare.

    python examples/digits.py            # one run, about a minute on two cores
    python examples/digits.py --seeds 5  # mean and spread over five runs

scikit-learn's digits (8x8 grey images), a small CNN with batch norm and depthwise blocks.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, QuantizedModel, verify
from lightning_qat.export.load import load_exporter


class Digits(L.LightningDataModule):
    """Half of the images of every class for training, half for testing."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels, dtype=torch.long)
        train, test = train_test_split(
            range(len(y)), test_size=0.5, random_state=seed, stratify=labels
        )
        self.train_set = TensorDataset(x[train], y[train])
        self.test_x, self.test_y = x[test], y[test]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train_set, batch_size=64, shuffle=True, drop_last=True)


class DigitsNet(L.LightningModule):
    """An ordinary LightningModule: nothing in it knows of quantization."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.features = nn.Sequential(
            _block(1, 16, 3), _block(16, 16, 3, groups=16), _block(16, 32, 1),
            _block(32, 32, 3, stride=2, groups=32), _block(32, 64, 1),
            _block(64, 64, 3, stride=2, groups=64), _block(64, 64, 1),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(x)).flatten(1))
        return logits

    def training_step(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.parameters(), self.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": cosine, "interval": "step"},
        }


def _block(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(cout), nn.ReLU())


TARGETS = ["fake_quant_onnx", "cann", "tflite"]
LITERAL = "fake_quant_onnx, onnxruntime, no optimizations"
"""The ONNX file as it is written: what ONNX Runtime's default session gives depends on the CPU."""

REASONS: dict[str, None] = {}
"""Why a runtime on this machine differs, as exporters explain it."""


def percent(hits: Tensor) -> float:
    return 100 * float(hits.float().mean())


def predictions(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net.eval()(x).argmax(1)  # type: ignore[no-any-return]


def run(seed: int, out: Path, epochs: int, qat_epochs: int) -> dict[str, tuple[float, float]]:
    """One float training, one QAT fine-tuning, every target.

    Percent of test images predicted right, and percent predicted as the ONNX file says, by name.
    Where a runtime differs, the agreement printed on the way says why.
    """
    L.seed_everything(seed, verbose=False)
    data, net = Digits(seed), DigitsNet()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    L.Trainer(max_epochs=epochs, accelerator="cpu", **quiet).fit(net, data)  # type: ignore[arg-type]
    found = {"float, torch": predictions(net, data.test_x)}
    with warnings.catch_warnings():  # torch's use of its own deprecated LeafSpec
        warnings.simplefilter("ignore", FutureWarning)
        # One file: beside one with external data the integer files would look larger than they are.
        path = out / "float.onnx"
        torch.onnx.export(net, (data.test_x[:2],), path, external_data=False, verbose=False)

    net.train()
    net.learning_rate = 1e-3
    qat = QATCallback("int8", exporters=TARGETS, export_dir=out)
    trainer = L.Trainer(max_epochs=qat_epochs, accelerator="cpu", callbacks=[qat], **quiet)  # type: ignore[arg-type]
    trainer.fit(net, data)

    found["QAT int8, torch"] = predictions(net, data.test_x)
    model = QuantizedModel.load(out / "digitsnet.pt2")
    inputs = {"x": data.test_x.numpy()}
    print("\nAgreement with the trained model, on all test images:")
    for result in qat.delivered:
        assert result.artifact is not None
        exporter = load_exporter(result.target)
        agreement = verify(model, result.artifact, data.test_x)
        print(agreement)
        REASONS.update(dict.fromkeys(agreement.remarks))
        for runtime in exporter.runtimes:  # type: ignore[attr-defined]
            outputs = exporter.run(result.artifact, runtime, inputs)  # type: ignore[attr-defined]
            found[f"{result.target}, {runtime}"] = torch.from_numpy(outputs["output"]).argmax(1)
    print("\nFile sizes:")
    for file in sorted((*out.glob("*.onnx"), *out.glob("*.tflite"))):
        size, whole = file.stat().st_size, (out / "float.onnx").stat().st_size
        print(f"  {file.name:32} {size:8,} bytes, {size / whole:.0%} of float")
    return {k: (percent(p == data.test_y), percent(p == found[LITERAL])) for k, p in found.items()}


def main(seeds: int = 1, out: Path = Path("qat_export"), epochs: int = 40, qat: int = 10) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # remarks on torchvision's absence
    out.mkdir(parents=True, exist_ok=True)
    runs = [run(seed, out, epochs, qat) for seed in range(seeds)]
    print(f"\nOn {len(Digits().test_y)} test images, mean of {seeds} run(s):")
    print(f"  {'':48} accuracy   predicts as the ONNX file says")
    for name in runs[0]:
        scores, same = zip(*(result[name] for result in runs), strict=True)
        spread = f" +- {statistics.stdev(scores):.2f}" if seeds > 1 else ""
        print(
            f"  {name:48} {statistics.mean(scores):6.2f} %{spread} {statistics.mean(same):8.2f} %"
        )
    for reason in REASONS:
        print(f"  On this machine: {reason}")
    print(f"\nFiles and manifest.json are in {out}.\nThe report: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many runs (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("qat_export"), help="folder for the files")
    parser.add_argument("--epochs", type=int, default=40, help="float epochs (default: 40)")
    parser.add_argument("--qat-epochs", type=int, default=10, help="QAT epochs (default: 10)")
    options = parser.parse_args()
    main(options.seeds, options.out, options.epochs, options.qat_epochs)
