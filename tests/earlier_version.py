"""A run whose files were written by version 0.1.0 before the packages became rooms.

``python -m tests.earlier_version`` wrote them, at commit ce6909c; newer versions only read them.
"""

from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qat import QATCallback, convert, prepare

FILES = Path(__file__).parent / "goldens/earlier_version"


class Residual(pl.LightningModule):
    """Convolutions with batch norm around an addition, a mean and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        y = F.relu(self.again(y) + y)
        return self.head(y.mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Recurrent(nn.Module):
    """An LSTM in both directions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Four batches, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 2, 6, 6, generator=generator)
    y = torch.randint(0, 3, (16,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(folder: Path, epochs: int, recipe: str = "int8") -> pl.Trainer:
    """A trainer whose epochs are two of four, when the checkpoint is written."""
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[QATCallback(recipe)],
    )


def write() -> None:
    """Write the files; only ever called with the earlier version."""
    FILES.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    module = Residual()
    run = trainer(FILES, epochs=2)
    run.fit(module, loader())
    run.save_checkpoint(FILES / "residual.ckpt")
    x = next(iter(loader()))[0]
    expected = {"x": x, "residual": module.eval()(x).detach()}
    run = trainer(FILES, epochs=4)
    run.fit(module.train(), loader(), ckpt_path=FILES / "residual.ckpt", weights_only=True)
    expected["resumed"] = module.eval()(x).detach()

    torch.manual_seed(0)
    model, steps = Recurrent(), torch.randn(2, 4, 3)
    prepare(model, "int8", example_inputs=steps)
    with torch.no_grad():
        model.train()(steps)
    quantized = convert(model.eval(), steps)
    quantized.save(FILES / "recurrent.pt2")
    expected |= {"steps": steps, "recurrent": model(steps).detach()}
    torch.save(expected, FILES / "expected.pt")


if __name__ == "__main__":
    write()
