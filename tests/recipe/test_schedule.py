"""When what happens, as tables over a run."""

import math
import re
from typing import Any

import pytest

from lightning_qat.recipe.schedule import Milestones, Phase, Schedule

SHORT = {
    "float": "F",
    "calibrate": "c",
    "quantize": "q",
    "observers_frozen": "o",
    "batchnorm_frozen": "b",
}


def run(schedule: Schedule, epochs: int, batches: int) -> str:
    """One letter per training batch, epochs apart; the loop of a trainer in four lines."""
    milestones, seen, shown = schedule.resolve(epochs), 0, []
    for epoch in range(epochs):
        letters = ""
        for _ in range(batches):
            phase = milestones.phase_at(epoch, seen)
            seen += phase.name != "float"
            letters += SHORT[phase.name]
        shown.append(letters)
    return " ".join(shown)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(), "cccc cccc oooo bbbb"),
        (Schedule(calibration_batches=2), "ccqq qqqq oooo bbbb"),
        (Schedule(calibration_batches=0), "qqqq qqqq oooo bbbb"),
        (Schedule(calibration_batches=3, quantize_from=1), "FFFF cccq oooo bbbb"),
        (Schedule(calibration_batches=1, quantize_from=0.5), "FFFF FFFF cooo bbbb"),
        (Schedule(1, 0, None, None), "cqqq qqqq qqqq qqqq"),
        (Schedule(1, 0, 1, None), "cqqq oooo oooo oooo"),
        (Schedule(1, 0, None, 1), "cqqq bbbb bbbb bbbb"),
        (Schedule(1, 0, 3, 1), "cqqq bbbb bbbb bbbb"),
        # Calibration is never cut short: a range that was not observed is of no use.
        (Schedule(6, 0, 0, None), "cccc ccoo oooo oooo"),
        # Without calibration batches the first batch gives the range.
        (Schedule(0, 0, 0, None), "qooo oooo oooo oooo"),
    ],
)
def test_the_phases_of_a_run_of_four_epochs_of_four_batches(
    schedule: Schedule, expected: str
) -> None:
    assert run(schedule, epochs=4, batches=4) == expected


@pytest.mark.parametrize(
    ("name", "index", "observing", "quantizing", "batchnorm_frozen", "position", "seen"),
    [
        ("float", 0, False, False, False, 0, 0),
        ("calibrate", 1, True, False, False, 1, 0),
        ("quantize", 2, True, True, False, 1, 2),
        ("observers_frozen", 3, False, True, False, 2, 9),
        ("batchnorm_frozen", 4, False, True, True, 3, 9),
    ],
)
def test_what_each_phase_does(
    name: Any,
    index: int,
    observing: bool,
    quantizing: bool,
    batchnorm_frozen: bool,
    position: int,
    seen: int,
) -> None:
    phase = Milestones(2, quantize_from=1, freeze_observers=2, freeze_batchnorm=3).phase_at(
        position, seen
    )
    assert phase == Phase(name, observing, quantizing, batchnorm_frozen)
    assert phase.index == index


def test_batch_norm_can_freeze_while_ranges_still_follow_the_data() -> None:
    phase = Milestones(0, 0, freeze_observers=5, freeze_batchnorm=1).phase_at(2, 9)
    assert phase == Phase("batchnorm_frozen", True, True, True)


def test_batch_norm_stays_frozen_in_float_and_calibration_when_it_is_due() -> None:
    milestones = Milestones(4, quantize_from=2, freeze_observers=9, freeze_batchnorm=1)
    assert milestones.phase_at(1, 0) == Phase("float", False, False, True)
    assert milestones.phase_at(2, 0) == Phase("calibrate", True, False, True)


@pytest.mark.parametrize(
    ("fraction", "total", "position"),
    [(0.5, 4, 2), (0.5, 5, 3), (0.25, 1, 1), (0.01, 1000, 10), (0.999, 10, 10)],
)
def test_a_fraction_becomes_the_next_whole_epoch(
    fraction: float, total: int, position: int
) -> None:
    resolved = Schedule(freeze_observers=fraction, freeze_batchnorm=None).resolve(total)
    assert resolved == Milestones(8, 0, position, math.inf)


def test_ints_and_none_need_no_length() -> None:
    schedule = Schedule(quantize_from=2, freeze_observers=3, freeze_batchnorm=None)
    assert not schedule.has_fractions
    assert schedule.resolve(math.inf) == Milestones(8, 2, 3, math.inf)


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_a_fraction_needs_a_run_with_an_end(interval: Any) -> None:
    schedule = Schedule(interval=interval)
    assert schedule.has_fractions
    with pytest.raises(
        ValueError,
        match=f"fractions need a run of known length; this run has no last {interval}.*"
        "set max_epochs or max_steps",
    ):
        schedule.resolve(math.inf)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"calibration_batches": -1}, "calibration_batches must be 0 or more; got -1"),
        ({"calibration_batches": True}, "calibration_batches must be 0 or more; got True"),
        ({"calibration_batches": 1.5}, "calibration_batches must be"),
        ({"calibration_batches": "8"}, "calibration_batches must be"),
        ({"quantize_from": None}, "quantize_from must be a number; got None"),
        ({"quantize_from": -1}, "quantize_from must be 0 or more; got -1"),
        ({"quantize_from": 1.0}, "Write 1 (an int) for that epoch."),
        ({"freeze_observers": "0.5"}, "freeze_observers must be a number or None; got '0.5'"),
        ({"freeze_observers": True}, "freeze_observers must be a number or None; got True"),
        (
            {"freeze_observers": 1.0},
            "freeze_observers must lie strictly between 0 and 1 when it is a fraction; got 1.0. "
            "Write 1 (an int) for that epoch, None for never.",
        ),
        ({"freeze_batchnorm": 0.0}, "Write 0 (an int) for that epoch, None for never."),
        ({"freeze_batchnorm": 2.7}, "Write 3 (an int)"),
        ({"freeze_batchnorm": -0.5}, "must lie strictly between 0 and 1"),
        ({"freeze_batchnorm": float("nan")}, "freeze_batchnorm must"),
        ({"freeze_batchnorm": float("inf")}, "freeze_batchnorm must"),
        ({"freeze_batchnorm": -3}, "freeze_batchnorm must be 0 or more; got -3"),
        ({"interval": "batch"}, "interval must be 'epoch' or 'step'; got 'batch'"),
        ({"freeze_observers": 1.0, "interval": "step"}, "Write 1 (an int) for that step"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values: Any, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        Schedule(**values)


def test_all_wrong_values_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"^Schedule: quantize_from .*freeze_batchnorm .*interval"):
        Schedule(quantize_from=-1, freeze_batchnorm=1.0, interval="x")  # type: ignore[arg-type]
