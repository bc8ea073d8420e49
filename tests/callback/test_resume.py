"""A resumed run is the uninterrupted run to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_qat import QATCallback, Schedule
from tests.callback.tiny import BATCHES, Net, loader, ranges, same

BATCHES_PER_RUN = 5 * BATCHES
SCHEDULE = Schedule(calibration_batches=5, freeze_observers=3, freeze_batchnorm=3)
DATA = list(loader())

# Of a checkpoint within an epoch; what it warns of is what ByIndex makes good.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class ByIndex(Net):
    """A plain DataLoader starts over on a mid-epoch resume; the batch index does not."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # type: ignore[override]
        return super().training_step(DATA[batch_idx])


class Adam(ByIndex):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES_PER_RUN)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def seeded(kind: type[Net]) -> Net:
    L.seed_everything(3, verbose=False)
    return kind()


@pytest.mark.parametrize("kind", [ByIndex, Adam])
@pytest.mark.parametrize("step", [4, 3, 8, 10], ids=lambda step: f"after step {step}")
def test_a_resumed_run_is_the_uninterrupted_run_to_the_bit(
    trainer: Callable[..., L.Trainer], tmp_path: Path, step: int, kind: type[Net]
) -> None:
    # While calibrating (steps 3, 4) and later, at an epoch's boundary (4, 8) and within one.
    saved = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=step, save_top_k=-1)
    options: dict[str, Any] = {"max_epochs": 5, "enable_checkpointing": True}
    whole, wholly = seeded(kind), QATCallback(schedule=SCHEDULE)
    run = trainer(wholly, saved, **options)
    run.fit(whole, loader())
    resumed, again = seeded(kind), QATCallback(schedule=SCHEDULE)
    rerun = trainer(again, max_epochs=5)
    rerun.fit(resumed, loader(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(resumed.losses) == BATCHES_PER_RUN - step >= 10
    assert resumed.losses == whole.losses[step:]
    assert same(resumed.state_dict(), whole.state_dict())
    assert ranges(resumed) == ranges(whole)
    assert same(rerun.optimizers[0].state_dict(), run.optimizers[0].state_dict())
    assert again.state_dict() == wholly.state_dict()


def test_a_checkpoint_that_is_loaded_and_saved_is_the_same(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    first = trainer(QATCallback(schedule=SCHEDULE), max_epochs=4)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")

    class Save(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "two.ckpt")

    trainer(QATCallback(schedule=SCHEDULE), Save(), max_epochs=5).fit(
        Net(), loader(), ckpt_path=tmp_path / "one.ckpt"
    )
    one, two = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("one", "two"))
    for key in ("state_dict", "callbacks", "optimizer_states"):
        assert same(one[key], two[key])


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_longer_run_does_not_thaw_what_was_frozen(
    trainer: Callable[..., L.Trainer], tmp_path: Path, interval: Any
) -> None:
    schedule = Schedule(calibration_batches=1, freeze_batchnorm=0.5, interval=interval)
    first = trainer(QATCallback(schedule=schedule), max_epochs=4)
    net = Net()
    first.fit(net, loader())
    first.save_checkpoint(tmp_path / "frozen.ckpt")
    before, statistics = ranges(net), net.bn.running_mean.clone()  # type: ignore[union-attr]
    longer = Net()
    # Half of 40 epochs is later than the 4 that the checkpoint has seen.
    trainer(QATCallback(schedule=schedule), max_epochs=40, limit_train_batches=2, max_steps=24).fit(
        longer, loader(scale=3), ckpt_path=tmp_path / "frozen.ckpt"
    )
    assert ranges(longer) == before
    assert torch.equal(longer.bn.running_mean, statistics)  # type: ignore[arg-type]
    assert longer.losses
