"""Checkpoints as a Trainer writes them."""

from pathlib import Path
from typing import Any

import lightning as L
import torch


def write_checkpoint(path: Path, module: L.LightningModule, **more: Any) -> Path:
    """What ``ModelCheckpoint(save_weights_only=True)`` writes."""
    hyper = dict(module.hparams)
    content = {"state_dict": module.state_dict(), "hyper_parameters": hyper, **more}
    torch.save({**content, "pytorch-lightning_version": L.__version__}, path)
    return path
