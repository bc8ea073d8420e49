"""An exporter of a third party costs only itself, whatever it does."""

import hashlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qat.export.delivery.export_all import export_all
from lightning_qat.export.delivery.result import NotTried, error_text
from lightning_qat.export.export import export
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from tests.export.delivery import odd
from tests.export.delivery.odd import OfItsOwn, Text, WithoutText, named, raises, returns


def targets(folder: Path) -> Any:
    """What the manifest says, every file of which is as it says."""
    said = json.loads((folder / "manifest.json").read_text())["targets"]
    for entry in said.values():
        for file in entry.get("files", {}).values():
            content = (folder / file["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
            assert len(content) == file["bytes"]
    return said


def link_outside(path: Path) -> Path:
    outside = path.parent.parent / "outside.txt"
    outside.touch()
    path.symlink_to(outside)
    return path


ODD: dict[str, tuple[Callable[[QuantizedModel], Any], str]] = {
    "SystemExit": (raises(SystemExit(3)), "SystemExit: 3"),
    "KeyboardInterrupt of its own": (raises(KeyboardInterrupt()), "KeyboardInterrupt"),
    "a BaseException": (raises(OfItsOwn("odd")), "OfItsOwn: odd"),
    "without text": (raises(WithoutText()), r"its text cannot be read \(ValueError\)"),
    "GeneratorExit": (raises(GeneratorExit()), "GeneratorExit"),
    "a missing file": (
        named(lambda path: path.with_name("missing.txt")),
        r"'model': there is no file '.*missing.txt'. That is for its author to mend",
    ),
    "a folder": (named(lambda path: path.parent), r"'model': there is no file"),
    "a file outside": (
        named(lambda path: Path(__file__)),
        r"'model': '.*test_odd_exporters.py' is not in '.*out'",
    ),
    "a link outside": (named(link_outside), r"_odd.txt' is not in '.*out'"),
    "a name that is too long": (
        named(lambda path: path.with_name("n" * 300)),
        "name too long|there is no file",
    ),
    "no path": (named(str), "must name its files as pathlib.Path; these are none: 'model'"),
    "no files": (returns(lambda path: Artifact("odd", {})), "it names none"),
    "nothing": (returns(lambda path: None), "must return an Artifact .* got NoneType"),
    "notes that are no text": (
        named(lambda path: path, notes=(Path("note"),)),
        "must give its notes as strings",
    ),
    "a changed number": (odd.changes_a_number, "changed the converted model, which it may only"),
    "a changed graph": (odd.changes_the_graph, "changed the converted model, which it may only"),
    "changed inputs": (odd.changes_the_example, "changed the converted model, which it may only"),
}


@pytest.mark.parametrize(("first", "message"), ODD.values(), ids=ODD)
def test_it_is_an_error_of_that_target_alone(
    model: QuantizedModel, tmp_path: Path, first: Callable[[QuantizedModel], Any], message: str
) -> None:
    before = QuantizedModel.fingerprint.func(model)  # type: ignore[attr-defined]
    seen: list[str] = []

    def look(given: QuantizedModel) -> None:
        seen.append(QuantizedModel.fingerprint.func(given))  # type: ignore[attr-defined]
        assert given(*given.example_inputs[0]).isfinite().all()

    exporters = [Text("before"), Text("odd", first), Text("after", look)]
    delivery = export_all(model, exporters, tmp_path / "out", "net")
    assert [result.error is None for result in delivery.results] == [True, False, True]
    assert delivery.failed == ("odd",)
    assert delivery.interrupt is None
    said = targets(tmp_path / "out")
    assert said.keys() == {"before", "odd", "after"}
    assert re.search(message, said["odd"]["error"])
    assert re.search(rf"\nodd: .*{message}", delivery.problem() or "")
    # The next target gets the model as it was.
    assert seen == [before]


@pytest.mark.parametrize(
    "first",
    [odd.prints, odd.leaves_the_folder, odd.closes_the_output, odd.changes_torch],
    ids=lambda first: first.__name__,
)
def test_what_it_changes_in_the_process_is_put_back(
    model: QuantizedModel,
    tmp_path: Path,
    first: Callable[[QuantizedModel], Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    streams = [os.fdopen(os.dup(number), "w") for number in (1, 2)]
    # As in a program; pytest's own streams are no files.
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    # A relative folder, too.
    delivery = export_all(model, [Text("odd", first), Text("after")], Path("out"), "net")
    assert [result.error for result in delivery.results] == [None, None]
    assert targets(tmp_path / "out").keys() == {"odd", "after"}
    assert Path.cwd() == tmp_path
    assert torch.get_default_dtype() == torch.float32
    assert torch.is_grad_enabled()
    print("on the output", flush=True)
    print("on the error", file=sys.stderr, flush=True)
    os.write(2, b"past Python\n")
    for stream in (*streams, sys.stdout, sys.stderr):
        stream.close()
    captured = capfd.readouterr()
    assert captured.out.endswith("on the output\n")
    assert captured.err.endswith("on the error\npast Python\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_ctrl_c_ends_the_exports_with_a_true_manifest(
    model: QuantizedModel, tmp_path: Path, number: signal.Signals
) -> None:
    def leave(*arguments: object) -> None:
        raise SystemExit("asked to stop")

    # Lightning leaves Ctrl-C ignored once it has ended a run.
    handler = leave if number == signal.SIGTERM else signal.default_int_handler
    before = signal.signal(number, handler)
    try:
        exporters = [
            Text("before"),
            Text("odd", lambda model: signal.raise_signal(number)),
            Text("after"),
        ]
        delivery = export_all(model, exporters, tmp_path, "net")
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert isinstance(delivery.interrupt, KeyboardInterrupt | SystemExit)
    assert delivery.failed == ("odd", "after")
    assert isinstance(delivery.results[2].error, NotTried)
    said = targets(tmp_path)
    assert "files" in said["before"]
    assert said["after"] == {"error": "NotTried: it was not tried, because the run was interrupted"}


def test_an_export_of_one_target_says_so_too(model: QuantizedModel, tmp_path: Path) -> None:
    missing = Text("odd", named(lambda path: path.with_name("missing.txt")))
    with pytest.raises(ValueError, match=r"'model': there is no file '.*missing.txt'"):
        export(model, missing, tmp_path / "net")


def test_an_error_without_text_has_its_name() -> None:
    assert error_text(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert error_text(WithoutText()) == "WithoutText: its text cannot be read (ValueError)"
