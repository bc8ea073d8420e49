"""The script for GPUs, tried on a CPU with narrow networks: rows, tables, resuming, refusals."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks import row_process as process_file
from benchmarks.on_gpu import results as results_file
from benchmarks.on_gpu.results import Results, facts
from benchmarks.on_gpu.steps import Config, model_of, stepper
from benchmarks.row_process import RowFailed, RowProcess, choose_start

EAGER = "convnext 128/tf32/eager"


def run(file: Path, rows: str, *more: str) -> int:
    return gpu.main(["--device", "cpu", "--tiny", "--json", str(file), "--rows", rows, *more])


def rows_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())["runs"][-1]["rows"]
    return found


def test_rows_become_a_table_and_are_not_measured_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert run(file, f"{EAGER}/joins, frozen") == 0
    first = rows_of(file)
    assert list(first) == [f"{EAGER}/joins, frozen"]
    assert first[f"{EAGER}/joins, frozen"]["ratio"] > 0
    # What is there stays; what is missing is added.
    assert run(file, f"{EAGER}/[fjl]*") == 0
    assert run(file, "bandwidth/1 MB/float32/*fake_quantize") == 0
    rows = rows_of(file)
    assert rows[f"{EAGER}/joins, frozen"] == first[f"{EAGER}/joins, frozen"]
    assert {f"{EAGER}/joins, frozen, compact", f"{EAGER}/layers, frozen"} <= rows.keys()
    assert {"forward", "backward", "copy"} <= rows["bandwidth/1 MB/float32/fake_quantize"].keys()
    printed = capsys.readouterr().out.rpartition("Narrow networks")[2]
    assert "| | ConvNeXt-T-like, batch 128 |\n|---|---|\n| float | " in printed
    assert "| joins, frozen, compact | " in printed
    assert "| learned_fake_quantize |  | 0." in printed
    assert "failed" not in printed.replace("torch.ao", "")
    (header,) = (run for run in json.loads(file.read_text())["runs"])
    assert {"commit", "sources", "torch", "triton", "card", "date"} <= header.keys()


def test_another_commit_and_fresh_begin_anew_and_keep_what_was_measured(tmp_path: Path) -> None:
    file, here = tmp_path / "gpu.json", facts("cpu", narrow=True)
    one = Results(file, here, fresh=False)
    one.add("tests", {"summary": "3 passed"})
    again = Results(file, facts("cpu", narrow=True), fresh=False)
    assert again.rows == one.rows
    other = Results(file, {**here, "commit": "another"}, fresh=False)
    assert other.rows == {}
    other.add("tests", {"error": "1 failed"})
    assert Results(file, here, fresh=True).rows == {}
    assert [run["commit"] for run in json.loads(file.read_text())["runs"]] == [
        here["commit"],
        "another",
    ]
    assert "Tests that need CUDA: 1 failed." in other.markdown()


def answers(kind: str) -> Iterator[Any]:
    """What a row's process may do."""
    yield 1
    if kind == "raises":
        raise RuntimeError("out of\n\n  memory")
    if kind == "dies":
        os._exit(7)
    time.sleep(60)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("raises", "RuntimeError: out of memory"),
        ("dies", r"its process died \(exit code 7\)"),
        ("hangs", "not ready in time"),
    ],
)
def test_a_row_that_fails_says_why_and_leaves_no_process(kind: str, reason: str) -> None:
    process = RowProcess(answers, kind)
    try:
        assert process.answer(time.monotonic() + 60) == 1
        with pytest.raises(RowFailed, match=reason) as error:
            process.answer(time.monotonic() + (0.5 if kind == "hangs" else 60))
    finally:
        process.stop()
    assert error.value.in_time is (kind != "hangs")
    assert not process.is_alive


def raises() -> Iterator[Any]:
    raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")
    yield


def works() -> Iterator[Any]:
    yield 1


@pytest.mark.parametrize(("touches", "start"), [(works, "forkserver"), (raises, "spawn")])
def test_processes_are_spawned_where_they_could_not_use_the_device(
    touches: Any, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_file, "_start", "forkserver")
    assert choose_start(touches) == start


def test_a_failing_variant_costs_its_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "peer_variants", lambda: ["Nobody's 1.0"])
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu, "OWN", ("joins, frozen",))
    assert run(file, f"{EAGER}/*") == 0
    rows = rows_of(file)
    assert rows[f"{EAGER}/Nobody's 1.0"]["error"] == """KeyError: "Nobody's 1.0\""""
    assert "Traceback" in rows[f"{EAGER}/Nobody's 1.0"]["details"]
    assert "ratio" in rows[f"{EAGER}/joins, frozen"]
    printed = capsys.readouterr().out
    assert "| Nobody's 1.0 | failed |" in printed
    assert f"- {EAGER}/Nobody's 1.0: KeyError" in printed


def test_what_there_is_no_time_for_is_named_and_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert run(file, f"{EAGER}/*, frozen", "--minutes", "0.001") == 0
    assert not file.exists()
    printed = capsys.readouterr().out
    assert "the same command goes on with them" in printed
    assert f"  {EAGER}: joins, frozen; layers, frozen" in printed


def test_without_a_card_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    said = capsys.readouterr().err
    assert "needs a CUDA card" in said
    assert "python -m benchmarks.gpu --device cpu --tiny" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cpu"], "--device cpu must come with --tiny"),
        (["--rows", "resnet500*"], "'resnet500\\*' fits none. --list prints all rows"),
    ],
)
def test_wrong_options_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(arguments)
    assert said.replace("\\", "") in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"Name another one with --json"):
        Results(file, facts("cpu", narrow=True), fresh=True)
    assert run(file, "tests") == 2
    assert "another one with --json" in capsys.readouterr().err
    assert file.read_text() == "[1]"


def test_the_most_telling_rows_come_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(names) == len(set(names))
    steps = [name for name in names if "/" in name and not name.startswith("bandwidth")]
    assert names.index("tests") < names.index(steps[0])
    assert steps[:2] == [f"resnet50 256/bf16/eager/{v}" for v in ("float", "joins, frozen")]
    variants = [name.rpartition("/")[2] for name in steps if name.startswith("vit 128/bf16/graphs")]
    assert {"float", "joins, observing", "joins, learned", "joins, frozen, compact"} <= {*variants}
    assert any(variant.startswith("torch.ao FX") for variant in variants)


@pytest.mark.parametrize("net", ["resnet50", "mobilenet", "vit", "convnext"])
def test_every_network_trains_in_bf16_and_channels_last(net: str) -> None:
    config = Config(net, 1, "bf16", "eager")
    model, x, y = model_of(config, "joins, observing", "cpu", narrow=True)
    assert x.is_contiguous(memory_format=torch.channels_last)
    stepper(model, x, y, config)()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_marker_finds_the_tests_that_need_a_card() -> None:
    files = gpu.files_with_cuda_tests()
    assert {"test_devices.py", "test_cuda_graphs.py", "test_precision.py"} <= {
        Path(file).name for file in files
    }
    assert results_file.ROOT / "tests" in Path(files[0]).parents
