"""Searches before training leave no trace in the ranges."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from tests.callback.tiny import BATCHES, Net, loader, qat, ranges


def test_a_learning_rate_search_leaves_no_trace(trainer: Callable[..., L.Trainer]) -> None:
    class Tunable(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Wild(LearningRateFinder):
        """Searches on data far outside the training data."""

        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            forward = pl_module.forward
            pl_module.forward = lambda x: forward(x * 1000)  # type: ignore[method-assign]
            self.lr_find(trainer, pl_module)
            del pl_module.forward

    net = Tunable()
    run = trainer(Wild(num_training_steps=3), qat())
    run.fit(net, loader())
    data = torch.cat([x for x, _ in loader()])
    assert ranges(net)[0][1] <= float(data.max())


class Tunable(Net):
    """Its learning rate and batch size can be searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.1, 8
        self.searching = 0

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.searching += 1
        return super().training_step(batch)

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(scale=100)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr)


def seeded() -> Tunable:
    L.seed_everything(1, verbose=False)
    return Tunable()


class SameRate(LearningRateFinder):
    """Searches, and then leaves the learning rate as it was."""

    def lr_find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Tunable)
        super().lr_find(trainer, pl_module)
        pl_module.lr = 0.1
        for optimizer in trainer.optimizers:
            optimizer.param_groups[0]["lr"] = 0.1


class SameSize(BatchSizeFinder):
    """Searches, and then leaves the batch size as it was."""

    def scale_batch_size(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Tunable)
        super().scale_batch_size(trainer, pl_module)
        pl_module.batch_size = 8
        trainer.fit_loop._combined_loader = None
        trainer.fit_loop.setup_data()


@pytest.mark.parametrize("search", ["callback: rate", "callback: size", "Tuner"])
@pytest.mark.filterwarnings("ignore:.*The ``compile`` argument")
def test_a_run_after_a_search_is_the_run_without_it(
    trainer: Callable[..., L.Trainer], search: str
) -> None:
    plain, searched = seeded(), seeded()
    trainer(qat()).fit(plain)
    if search == "callback: rate":
        run = trainer(qat(), SameRate(num_training_steps=5))
    elif search == "callback: size":
        run = trainer(qat(), SameSize(steps_per_trial=2, max_trials=2, init_val=2))
    else:
        run = trainer(qat())
        Tuner(run).lr_find(searched, num_training=5, update_attr=False)
        Tuner(run).scale_batch_size(searched, steps_per_trial=2, max_trials=2)
        searched.batch_size = 8
    run.fit(searched)
    assert searched.searching > plain.searching
    assert searched.losses[-2 * BATCHES :] == plain.losses
    assert ranges(searched) == ranges(plain)


def test_a_search_in_the_middle_of_training_leaves_no_trace_either(
    trainer: Callable[..., L.Trainer],
) -> None:
    class EveryEpoch(SameRate):
        def on_fit_start(self, *args: Any) -> None: ...

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    plain, searched = seeded(), seeded()
    trainer(qat()).fit(plain)
    trainer(qat(), EveryEpoch(num_training_steps=3)).fit(searched)
    assert ranges(searched)[0] == ranges(plain)[0]
    assert searched.losses[-BATCHES:] == plain.losses[-BATCHES:]
