"""Checkpoints of QAT runs: into a module, and into what ``inspect`` shows."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn

from lightning_qat.callback.qat_callback import QATCallback
from lightning_qat.checkpoint.load import load_qat_checkpoint, read_checkpoint
from lightning_qat.prepare.prepare import prepare
from reliability.fuzz.mutate_torch import mutate_torch
from reliability.fuzz.reader import Reader


class Tiny(L.LightningModule):
    """One layer and one join: every kind of key that a checkpoint has."""

    def __init__(self, scale: float = 2.0, note: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.linear = nn.Linear(3, 2)
        self.example_input_array = torch.ones(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        """A sum."""
        y: Tensor = self.linear(x) * self.hparams["scale"] + x[:, :2]
        return y


def _seeds(folder: Path) -> Sequence[Path]:
    module, callback = Tiny(), QATCallback("int8")
    prepare(module, "int8", torch.ones(1, 3))
    module.train()(torch.ones(1, 3))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": L.__version__,
    }
    whole = {
        **weights,
        "epoch": 1,
        "global_step": 4,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {callback.state_key: callback.state_dict()},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
    }
    torch.save(whole, folder / "whole.ckpt")
    torch.save(weights, folder / "weights.ckpt")
    return [folder / "whole.ckpt", folder / "weights.ckpt"]


def _read(path: Path) -> object:
    read_checkpoint(path)
    load_qat_checkpoint(Tiny, path)
    return path


READER = Reader("checkpoint", _seeds, mutate_torch, _read, (ValueError, RuntimeError))
