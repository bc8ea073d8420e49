"""The fuzzer tells faults of every kind apart, and its inputs repeat."""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="the fuzzer limits memory as Unix does")

from reliability.fuzz.__main__ import main
from reliability.fuzz.run import Outcome, fuzz
from reliability.fuzz.worker import make_input, write_seeds
from tests.reliability.toy_reader import KINDS, READER

TOY = "tests.reliability.toy_reader"


def test_every_kind_of_fault_is_counted(tmp_path: Path) -> None:
    outcome = fuzz(TOY, tmp_path / "run", count=24, jobs=2, hang_s=0.2, memory_bytes=2**30)
    folder = tmp_path / "again"
    folder.mkdir()
    seeds = write_seeds(READER, folder)
    expected = Counter(make_input(READER, seeds, 0, index)[0] for index in range(24))
    assert set(expected) == set(KINDS)
    found = {place: len(inputs) for place, inputs in outcome.found.items()}
    assert (
        sum(n for place, n in found.items() if place.startswith("KeyError"))
        == expected[b"undocumented"]
    )
    assert outcome.hangs == expected[b"endless"]
    assert found["process ended with SIGABRT"] == expected[b"fatal"]
    if sys.platform == "linux":
        greedy = sum(n for place, n in found.items() if place.startswith("MemoryError"))
        assert greedy == expected[b"greedy"]
    assert outcome.inputs <= 24


def test_the_command_ends_with_1_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("reliability.fuzz.__main__.READERS", {"toy": TOY})
    monkeypatch.setattr(
        "reliability.fuzz.__main__.fuzz",
        lambda *args, **kwargs: fuzz(*args, **{**kwargs, "hang_s": 0.2, "memory_bytes": 2**30}),
    )
    assert main(["toy", "--count", "24", "--jobs", "1", "--keep", str(tmp_path / "kept")]) == 1
    assert "KeyError" in capsys.readouterr().out
    kept = [path.read_bytes() for path in (tmp_path / "kept").glob("*KeyError*.txt")]
    assert kept == [b"undocumented"]


def test_a_run_that_is_stopped_counts_what_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(module: str, folder: Path, **options: Any) -> Outcome:
        def progress(outcome: Outcome) -> None:
            options["progress"](outcome)
            raise KeyboardInterrupt

        return fuzz(module, folder, **{**options, "progress": progress, "hang_s": 0.2})

    monkeypatch.setattr("reliability.fuzz.__main__.READERS", {"toy": TOY})
    monkeypatch.setattr("reliability.fuzz.__main__.fuzz", stopped)
    assert main(["toy", "--count", "24", "--jobs", "1", "--keep", str(tmp_path)]) == 130
    assert "toy" in capsys.readouterr().out


def test_a_reader_that_refuses_its_own_file_is_broken(tmp_path: Path) -> None:
    broken = READER.__class__(
        "broken",
        READER.seeds,
        READER.mutate,
        lambda path: (_ for _ in ()).throw(ValueError("no")),
        (ValueError,),
    )
    with pytest.raises(ValueError, match=r"refuses its whole file whole\.txt: no"):
        write_seeds(broken, tmp_path)
