"""Searches before training leave no trace in the ranges."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

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


class Deep(Tunable):
    """A layer behind a relu: the plan of the first forward gives its input a range from 0."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize("inputs_known", [False, True])
@pytest.mark.filterwarnings("ignore:.*The ``compile`` argument")
def test_a_search_restores_what_was_there_before_the_first_forward_made_the_plan(
    trainer: Callable[..., L.Trainer], inputs_known: bool
) -> None:
    L.seed_everything(1, verbose=False)
    plain, searched = Deep(), Deep()
    searched.load_state_dict(plain.state_dict())
    options = {"example_inputs": torch.zeros(2, 1, 6, 6)} if inputs_known else {}
    trainer(qat(**options)).fit(plain)
    run = trainer(qat(**options))
    Tuner(run).lr_find(searched, num_training=5, update_attr=False)
    Tuner(run).scale_batch_size(searched, steps_per_trial=2, max_trials=2)
    searched.batch_size = 8
    run.fit(searched)
    assert searched.losses[-2 * BATCHES :] == plain.losses
    assert ranges(searched) == ranges(plain)


def test_a_checkpoint_from_before_the_plan_starts_the_ranges_anew(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    class SaveFirst(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "first.ckpt")

    net = Deep()
    trainer(qat(), SaveFirst()).fit(net)
    assert all(high > 0 for _, high in ranges(net))
    wanted = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict(wanted)
    assert ranges(net) == [(0.0, 0.0)] * len(ranges(net))
    assert torch.equal(net.deep.weight, wanted["deep.weight"])
    # The plan stays, and goes on from there.
    trainer(qat()).fit(net, ckpt_path=tmp_path / "first.ckpt")
    assert all(high > 0 for _, high in ranges(net))
