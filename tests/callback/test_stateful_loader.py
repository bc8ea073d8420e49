"""A run that is resumed within an epoch of shuffled data is the uninterrupted one to the bit.

A plain ``DataLoader`` begins a new epoch in a new order, in float Lightning too. torchdata's
``StatefulDataLoader`` says where it stands, and Lightning keeps that in its checkpoints.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_qat import QATCallback, Schedule
from tests.callback.tiny import BATCHES, Net, loader, ranges, same

torchdata = pytest.importorskip(
    "torchdata.stateful_dataloader", reason="torchdata is not installed; extra dev has it"
)

pytestmark = [
    # torchdata's own call.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

EPOCHS = 3
SCHEDULE = Schedule(calibration_batches=5, freeze_observers=2, freeze_batchnorm=2)


def shuffled(kind: type[DataLoader[Any]], workers: int = 0) -> DataLoader[Any]:
    # A fork of this process would have locks of threads that it has not: JAX's, of other tests.
    start = "forkserver" if workers else None
    data = loader().dataset
    return kind(data, 8, shuffle=True, num_workers=workers, multiprocessing_context=start)


def run(
    trainer: Callable[..., L.Trainer],
    data: DataLoader[Any],
    *callbacks: L.Callback,
    **options: Any,
) -> tuple[Net, QATCallback]:
    L.seed_everything(3, verbose=False)
    net, callback = Net(), QATCallback(schedule=SCHEDULE)
    fit = trainer(callback, *callbacks, max_epochs=EPOCHS, enable_checkpointing=bool(callbacks))
    fit.fit(net, data, **options)
    return net, callback


def resumed_and_whole(
    trainer: Callable[..., L.Trainer],
    folder: Path,
    step: int,
    kind: type[DataLoader[Any]],
    workers: int = 0,
) -> tuple[tuple[Net, QATCallback], tuple[Net, QATCallback]]:
    saved = ModelCheckpoint(folder, "{step}", every_n_train_steps=step, save_top_k=-1)
    whole = run(trainer, shuffled(kind, workers), saved)
    torch.manual_seed(99)
    again = run(trainer, shuffled(kind, workers), ckpt_path=folder / f"step={step}.ckpt")
    return again, whole


@pytest.mark.parametrize("workers", [0, 1], ids=["this process", "a worker"])
@pytest.mark.parametrize("step", [3, 6], ids=lambda step: f"after step {step}")
def test_with_a_stateful_loader_a_resume_within_an_epoch_is_equal_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path, step: int, workers: int
) -> None:
    kind = torchdata.StatefulDataLoader
    (net, callback), (whole, wholly) = resumed_and_whole(trainer, tmp_path, step, kind, workers)
    assert net.losses == whole.losses[step:]
    assert len(net.losses) == EPOCHS * BATCHES - step
    assert same(net.state_dict(), whole.state_dict())
    assert ranges(net) == ranges(whole)
    assert callback.state_dict() == wholly.state_dict()


def test_with_a_plain_loader_it_is_not(trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    (net, _), (whole, _) = resumed_and_whole(trainer, tmp_path, 6, DataLoader)
    assert net.losses != whole.losses[6:]
