"""``PhaseTracker``: batches counted, phases entered, saved and resumed, without a trainer."""

import pytest

from lightning_qat import Schedule
from lightning_qat.callback.phase_tracker import PhaseTracker

SCHEDULE = Schedule(calibration_batches=2, quantize_from=1, freeze_observers=3)


def tracker(schedule: Schedule = SCHEDULE) -> PhaseTracker:
    made = PhaseTracker(schedule)
    made.set_milestones(schedule.resolve(4))
    return made


def run(made: PhaseTracker, epochs: range, batches: int = 3) -> list[str]:
    names = []
    for epoch in epochs:
        for batch in range(batches):
            names.append(made.enter_phase(epoch, epoch * batches + batch).name)
            made.count_batch()
    return names


def test_float_batches_do_not_count_as_calibration() -> None:
    made = tracker()
    assert run(made, range(2)) == ["float"] * 3 + ["calibrate", "calibrate", "quantize"]
    assert made.batches_seen == 3


@pytest.mark.parametrize(("interval", "phase"), [("epoch", "float"), ("step", "calibrate")])
def test_positions_are_epochs_or_steps(interval: str, phase: str) -> None:
    schedule = Schedule(quantize_from=1, interval=interval)  # type: ignore[arg-type]
    assert tracker(schedule).enter_phase(epoch=0, step=1).name == phase


def test_a_resumed_run_continues_and_undoes_nothing() -> None:
    first = tracker()
    run(first, range(4))
    state = first.state_dict()
    assert state["batches_seen"] == 9
    longer = PhaseTracker(Schedule(calibration_batches=2, freeze_observers=90))
    longer.load_state_dict(state)
    assert longer.phase == first.phase
    longer.set_milestones(Schedule(calibration_batches=2, freeze_observers=90).resolve(100))
    assert longer.enter_phase(epoch=4, step=12).observing is False


def test_a_run_from_the_beginning_inherits_nothing() -> None:
    made = tracker()
    run(made, range(4))
    made.start_anew()
    assert made.state_dict() == {"phase": None, "batches_seen": 0}


def test_a_run_that_never_quantized_is_reported() -> None:
    made = tracker()
    assert made.never_quantized() is None
    run(made, range(2), batches=1)
    message = made.never_quantized()
    assert message is not None
    assert "phase 'calibrate' after 1 of 2 calibration batches" in message
    run(made, range(2, 4))
    assert made.never_quantized() is None
