"""Every way a Trainer can loop: accumulation, limits, several optimizers, manual steps."""

import time
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_qat import QATCallback, Schedule
from lightning_qat.training.range_sync import activation_quantizers
from tests.callback.tiny import BATCHES, Net, loader, qat, ranges

OBSERVED = 2 * BATCHES
"""Batches of two epochs, all of them observed by ``qat()``."""


def batches_observed(net: nn.Module) -> float:
    return float(next(iter(activation_quantizers(net).values())).batches)


@pytest.mark.parametrize(
    ("options", "observed"),
    [
        ({"accumulate_grad_batches": 3}, OBSERVED),
        ({"gradient_clip_val": 0.1}, OBSERVED),
        ({"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}, OBSERVED),
        ({"limit_train_batches": 3}, 6),
        ({"limit_train_batches": 0.5, "limit_val_batches": 1}, 4),
        ({"overfit_batches": 3}, 6),
        ({"val_check_interval": 1}, OBSERVED),
        ({"val_check_interval": 0.5, "num_sanity_val_steps": -1}, OBSERVED),
        ({"check_val_every_n_epoch": 2}, OBSERVED),
        ({"max_epochs": -1, "max_steps": 5}, 5),
        ({"max_epochs": None, "max_steps": 5}, 5),
        ({"max_steps": 3, "accumulate_grad_batches": 2}, 6),
        ({"max_time": {"hours": 1}}, OBSERVED),
        ({"min_epochs": 1, "reload_dataloaders_every_n_epochs": 1}, OBSERVED),
        ({"barebones": True}, OBSERVED),
        ({"detect_anomaly": True}, OBSERVED),
        ({"deterministic": True, "inference_mode": False}, OBSERVED),
        ({"fast_dev_run": 3}, 3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_every_training_batch_is_observed_once(
    trainer: Callable[..., L.Trainer], options: dict[str, Any], observed: int
) -> None:
    net = Net()
    if "barebones" in options:
        # It allows none of the options that make a trainer quiet.
        run = L.Trainer(barebones=True, max_epochs=2, accelerator="cpu", callbacks=[qat()])
        run.fit(net, loader())
    else:
        trainer(qat(), **options).fit(net, loader(), loader(scale=100))
    assert batches_observed(net) == observed
    assert ranges(net)[0][1] <= float(max(x.max() for x, _ in loader()))


def test_a_time_limit_ends_the_run_as_usual(trainer: Callable[..., L.Trainer]) -> None:
    class Slow(Net):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            time.sleep(0.2)
            return super().training_step(batch)

    net = Slow()
    run = trainer(qat(), max_epochs=1000, max_time={"seconds": 1})
    run.fit(net, loader())
    assert run.state.finished
    assert 2 <= batches_observed(net) < 100


class Manual(Net):
    """Two optimizers, stepped by hand, each on every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()[batch_idx % 2]  # type: ignore[index]
        loss = super().training_step(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return (
            torch.optim.SGD([*self.conv.parameters(), *self.bn.parameters()], 0.1),
            torch.optim.SGD(self.head.parameters(), 0.1),
        )


def test_manual_optimization_with_several_optimizers(trainer: Callable[..., L.Trainer]) -> None:
    net = Manual()
    before = [p.clone() for p in (net.conv.weight, net.head.weight)]
    schedule = Schedule(calibration_batches=1, freeze_observers=1, freeze_batchnorm=None)
    trainer(QATCallback(schedule=schedule)).fit(net, loader())
    assert batches_observed(net) == BATCHES
    after = (net.conv.weight, net.head.weight)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_steps_of_a_schedule_count_the_steps_of_all_optimizers(
    trainer: Callable[..., L.Trainer],
) -> None:
    # One step a batch, whichever optimizer takes it; Trainer.global_step counts them all.
    net = Manual()
    schedule = Schedule(
        calibration_batches=1, freeze_observers=3, freeze_batchnorm=None, interval="step"
    )
    run = trainer(QATCallback(schedule=schedule))
    run.fit(net, loader())
    assert run.global_step == OBSERVED
    assert batches_observed(net) == 3


def test_parameter_groups_and_a_scheduler_are_left_alone(
    trainer: Callable[..., L.Trainer],
) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(
                [{"params": self.conv.parameters()}, {"params": self.head.parameters(), "lr": 1.0}],
                0.1,
            )
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    run = trainer(qat())
    run.fit(Groups(), loader())
    assert [group["lr"] for group in run.optimizers[0].param_groups] == [0.025, 0.25]
