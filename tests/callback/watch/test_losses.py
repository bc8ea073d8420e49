"""What the losses of a run are told of: hand-made sequences."""

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_qat.callback.watch import training_watch
from lightning_qat.callback.watch.losses import WINDOW, LossWatch
from lightning_qat.callback.watch.training_watch import TrainingWatch


def said(*phases: tuple[str, list[float]]) -> list[str]:
    watch, found = TrainingWatch(), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_watch, "say", found.append)
        for name, losses in phases:
            watch.enter(name)
            for loss in losses:
                watch.finish(LightningModule(), {"loss": torch.tensor(loss)})
    return found


def around(level: float, count: int = WINDOW) -> list[float]:
    """Losses between 90 and 110 % of a level."""
    return [level * (0.9 + 0.2 * (i % 5) / 4) for i in range(count)]


def test_a_run_as_it_should_be_is_told_nothing() -> None:
    falling = [1.0 / (1 + i / 10) for i in range(5 * WINDOW)]
    assert said(("calibrate", falling[:8]), ("quantize", falling[8:]), ("float", [])) == []
    quantized = ("quantize", around(0.35, 60))
    assert said(("calibrate", around(0.2, 8)), quantized, ("observers_frozen", around(0.4))) == []


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("quantize", "lightning-qat sensitivity"),
        ("observers_frozen", "freeze_observers=0.75"),
        ("batchnorm_frozen", "freeze_batchnorm=None"),
    ],
)
def test_a_jump_at_a_phase_change_is_told_once_with_its_remedy(phase: str, remedy: str) -> None:
    (message,) = said(("calibrate", around(0.2, 8)), (phase, around(0.7, 3 * WINDOW)))
    assert f"the loss went from 0.195 to 0.7 when phase {phase!r} began" in message
    assert remedy in message


def test_a_jump_within_the_noise_is_none() -> None:
    noisy = [0.0, 1.0, 0.1, 0.9, 0.2, 0.8, 0.1, 0.9]
    assert said(("calibrate", noisy), ("quantize", around(1.2))) == []


def test_a_loss_that_rises_before_anything_is_quantized_has_too_high_a_learning_rate() -> None:
    rising = [0.1, 0.1, 0.11, 0.5, 0.9, 1.2, 1.5, 2.0]
    (message,) = said(("calibrate", rising), ("quantize", around(2.0)))
    assert "from 0.1 to 1.35 while nothing was quantized" in message
    assert "too high" in message


def test_divergence_is_told_once() -> None:
    (message,) = said(("quantize", around(0.2) + around(0.6) + around(0.9)))
    assert "rises in phase 'quantize': 0.6 now, 0.2 at its best" in message
    (message,) = said(("quantize", [float("nan")] * 3 * WINDOW))
    assert "not finite in phase 'quantize'" in message


def test_a_negative_loss_rises_by_its_magnitude() -> None:
    assert said(("quantize", around(-1.0) + around(-0.5))) == []
    assert len(said(("quantize", around(-1.0) + around(0.5)))) == 1


@pytest.mark.parametrize("outputs", [None, {}, {"loss": 1.0}, torch.ones(3)])
def test_without_a_loss_nothing_is_said(outputs: object) -> None:
    watch = LossWatch()
    assert [*watch.enter("quantize"), *[m for _ in range(50) for m in watch.add(outputs)]] == []
