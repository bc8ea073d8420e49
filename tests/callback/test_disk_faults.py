"""The disk fails after hours of training: what is saved, what was written, and how to finish.

Each fault is real: a full file system, a limit on files, a folder without permission, read-only,
gone, or a file. The commands in the message are run as they stand.
"""

import errno
import hashlib
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_qat.cli import main
from lightning_qat.export.protocol import Artifact
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters import FakeQuantOnnxExporter
from tests.callback.tiny import Net, Planned, loader, qat

NOBODY = 65534
TARGETS = ["fake_quant_onnx", "cann"]


class Then(L.Callback):
    """Does something to the export folder when the training has ended, before the export."""

    def __init__(self, fault: Callable[[], Any]) -> None:
        self.fault = fault

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.fault()


@contextmanager
def full_disk(out: Path) -> Iterator[Callable[[], None]]:
    """A file system of its own, with a few free bytes."""
    out.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(out)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    filler = out / "filler"
    try:
        yield lambda: fill(filler)
        filler.unlink()
    finally:
        # What is written later stays to be looked at.
        kept = out.with_name("kept")
        shutil.copytree(out, kept)
        subprocess.run(["umount", "-l", str(out)], check=True)
        shutil.copytree(kept, out, dirs_exist_ok=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(b"1" * 512)


@contextmanager
def small_files(out: Path) -> Iterator[Callable[[], None]]:
    """A limit of the system on what a file may hold, as a quota has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(out: Path) -> Iterator[Callable[[], None]]:
    """A file system that was mounted anew, as the system does after an error of the disk."""
    out.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(out)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system can be mounted by root only")
    again = ["mount", "-o", "remount,ro", str(out)]
    try:
        yield lambda: subprocess.run(again, check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(out)], check=True)


@contextmanager
def no_permission(out: Path) -> Iterator[Callable[[], None]]:
    """The folder belongs to someone else by now."""
    out.mkdir(parents=True)
    before = os.geteuid()

    def lose() -> None:
        out.chmod(0o555)
        if before == 0:
            os.seteuid(NOBODY)  # Root may write anywhere.

    for folder in out.parents:
        if before == 0 and folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o055)  # Others may look.
    try:
        yield lose
    finally:
        os.seteuid(before)
        out.chmod(0o755)


@contextmanager
def a_file_instead(out: Path) -> Iterator[Callable[[], None]]:
    def replace() -> None:
        shutil.rmtree(out)
        out.write_text("in the way")

    yield replace
    out.unlink()


FAULTS: dict[str, tuple[Any, str]] = {
    "full disk": (full_disk, r"OSError: [Errno 28] No space left on device: '{out}/planned.pt2'"),
    "quota": (small_files, r"OSError: [Errno 27] File too large: '{out}/planned.pt2'"),
    "read-only": (read_only, r"OSError: [Errno 30] Read-only file system: '{out}/"),
    "no permission": (no_permission, r"PermissionError: [Errno 13] Permission denied: '{out}/"),
    "a file": (a_file_instead, r"FileExistsError: [Errno 17] File exists: '{out}'"),
}


def manifest_is_true(folder: Path) -> dict[str, Any]:
    """What a manifest says of the targets; every file is as it says."""
    said: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["targets"]
    for entry in said.values():
        for file in entry.get("files", {}).values():
            content = (folder / file["path"]).read_bytes()
            assert hashlib.sha256(content).hexdigest() == file["sha256"]
    return said


def commands(message: str) -> list[list[str]]:
    """The commands of a message, as a shell reads them."""
    lines = [shlex.split(line) for line in message.splitlines() if "lightning-qat export " in line]
    return [words[words.index("lightning-qat") + 1 :] for words in lines]


def outputs(folder: Path, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = QuantizedModel.load(folder / "planned.pt2")(x)
    return found


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_the_message_says_what_is_saved_and_its_commands_finish_the_export(
    trainer: Callable[..., L.Trainer], tmp_path: Path, fault: Any, message: str
) -> None:
    out, saves = tmp_path / "disk" / "out", ModelCheckpoint(tmp_path / "saved", save_last=True)
    net = Planned()
    with ExitStack() as stack:
        begin = stack.enter_context(fault(out))
        callback = qat(exporters=TARGETS, export_dir=out, verify=False)
        run = trainer(callback, saves, Then(begin), enable_checkpointing=True)
        with pytest.raises(RuntimeError, match="exports failed") as caught:
            run.fit(net, loader())
    text = str(caught.value)
    assert text.startswith(f"2 of 2 exports failed; written to {str(out)!r}: no target.\n")
    for line in (*TARGETS, "planned.pt2", "manifest.json"):
        assert f"\n{line}: " in text
    assert message.format(out=out) in text
    assert f"the newest checkpoint is '{tmp_path}/saved/last.ckpt', of step 8 of 8." in text
    assert "To finish the export:" in text
    *from_model, from_checkpoint = commands(text)
    module = "tests.callback.tiny.Planned"
    assert from_checkpoint[1:4] == [f"{tmp_path}/saved/last.ckpt", "--module", module]
    # No other place takes the model either where the limit is the process's.
    assert len(from_model) == (fault is not small_files)
    assert ("Saved: the converted model is " in text) == (fault is not small_files)
    for command in (*from_model, from_checkpoint):
        assert command[-4:] == ["--to", "fake_quant_onnx,cann", "--out", str(out)]
        shutil.rmtree(out, ignore_errors=True)
        assert main(command) == 0
        said = manifest_is_true(out)
        assert [said[target].get("error") for target in TARGETS] == [None, None]
    # The weights of the training's end.
    x = torch.randn(4, 1, 6, 6)
    torch.testing.assert_close(outputs(out, x), net.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_folder_that_was_removed_is_made_again(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    callback = qat(exporters=["fake_quant_onnx"], export_dir=out, verify=False)
    trainer(callback, Then(lambda: shutil.rmtree(out))).fit(Net(), loader())
    assert manifest_is_true(out)["fake_quant_onnx"].keys() == {"files", "notes", "differences"}


def test_without_a_checkpoint_the_message_says_how_to_save_one(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    run = trainer(qat(exporters=TARGETS, export_dir=out), Then(lambda: as_file(out)))
    with pytest.raises(RuntimeError, match="exports failed") as caught:
        run.fit(Net(), loader())
    text = str(caught.value)
    assert "trainer.save_checkpoint('trained.ckpt') saves it" in text
    # The converted model was saved elsewhere, and is all that is needed.
    (command,) = commands(text)
    assert Path(command[1]).parent.parent == tmp_path
    out.unlink()
    assert main(command) == 0
    assert [manifest_is_true(out)[target].get("error") for target in TARGETS] == [None, None]
    run.save_checkpoint("trained.ckpt")
    assert torch.load("trained.ckpt", weights_only=True)["global_step"] == 8


def as_file(out: Path) -> None:
    shutil.rmtree(out)
    out.touch()


class Optioned(Planned):
    """Needs an argument that the checkpoint does not hold, and no example inputs are known."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.extra = nn.Linear(3, width)
        self.example_input_array = None  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.extra(super().forward(x))
        return found


def test_the_command_asks_for_what_only_the_user_knows(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    out, saves = tmp_path / "out", ModelCheckpoint(tmp_path / "saved", save_last=True)
    exporters: list[Any] = ["cann", FakeQuantOnnxExporter("int8"), Own()]
    callback = qat(exporters=exporters, export_dir=out, verify=False)
    run = trainer(callback, saves, Then(lambda: as_file(out)), enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="exports failed") as caught:
        run.fit(Optioned(3), loader())
    from_model, from_checkpoint = commands(str(caught.value))
    assert from_model[2:4] == ["--to", "cann"]
    assert "(fake_quant_onnx, own), are finished in Python: export(Quant" in str(caught.value)
    options = from_checkpoint[from_checkpoint.index("--init-args") :]
    assert options == ["--init-args", '{"width": VALUE}', "--example-inputs", "8,1,6,6"]
    out.unlink()
    assert main([word.replace("VALUE", "3") for word in from_checkpoint]) == 0


class Own:
    """A target of the user's own."""

    name = "own"

    def check_available(self) -> None: ...

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        path = path_prefix.with_suffix(".own")
        path.write_text("own")
        return Artifact(self.name, {"model": path})


class Interrupted(Own):
    name = "interrupted"

    def export(self, model: QuantizedModel, path_prefix: Path) -> Artifact:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("it went on")


@pytest.fixture
def heeded_ctrl_c() -> Iterator[None]:
    """Lightning leaves Ctrl-C ignored once it has ended a run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_ctrl_c")
@pytest.mark.filterwarnings("ignore:.*Detected KeyboardInterrupt")
def test_ctrl_c_during_the_export_ends_the_run_and_tells_the_truth(
    trainer: Callable[..., L.Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    callback = qat(exporters=[Own(), Interrupted(), "cann"], export_dir=out, verify=False)
    with pytest.raises(SystemExit):
        trainer(callback).fit(Net(), loader())
    said = manifest_is_true(out)
    assert said["own"]["files"].keys() == {"model"}
    assert said["interrupted"]["error"] == "KeyboardInterrupt"
    assert said["cann"]["error"].startswith("NotTried: ")
    assert [result.target for result in callback.delivered] == ["own", "interrupted", "cann"]
    (text,) = [m for m in caplog.messages if "exports failed" in m]
    assert "2 of 3 exports failed; written to" in text
    (command,) = commands(text)
    assert main(command) == 0
    assert "files" in manifest_is_true(out)["cann"]
    assert not [m for m in caplog.messages if "nothing was exported" in m]


def test_a_conversion_that_fails_says_what_is_saved(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(*arguments: Any, **options: Any) -> None:
        raise MemoryError("cannot allocate 8 GiB")

    monkeypatch.setattr("lightning_qat.callback.export.final_export.convert", too_large)
    saves = ModelCheckpoint(tmp_path / "saved", save_last=True)
    callback = qat(exporters=["cann"], export_dir=tmp_path / "out")
    text = "nothing was exported: MemoryError: cannot allocate 8 GiB\nSaved: the newest checkpoint"
    with pytest.raises(RuntimeError, match=text):
        trainer(callback, saves, enable_checkpointing=True).fit(Planned(), loader())


def test_a_full_disk_is_told_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=700)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    out = tmp_path / "out"
    callback = qat(exporters=TARGETS, export_dir=out, verify=False)
    # 63 parameters of 4 bytes, once for the model and once for each target.
    warning = r"out' has 0.0 MB of free space; the exports will need about 0.0 MB. Make room"
    with pytest.warns(UserWarning, match=warning):
        trainer(callback, max_epochs=1).fit(Planned(), loader())
    usage = usage._replace(free=800)
    trainer(qat(exporters=TARGETS, export_dir=out, verify=False), max_epochs=1).fit(
        Planned(), loader()
    )


def test_a_name_that_is_too_long_is_told_before_training(
    trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    net = Net()
    callback = qat(exporters=TARGETS, export_dir=tmp_path / ("n" * 300))
    with pytest.raises(MisconfigurationException, match=r"must be writable: .*File name too long"):
        trainer(callback).fit(net, loader())
    assert net.losses == []


def test_a_logger_that_fails_costs_a_warning(
    trainer: Callable[..., L.Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lightning_qat.callback.export.final_export.log_agreement", full)
    callback = qat(exporters=["fake_quant_onnx"], export_dir=tmp_path / "out", verify=False)
    with pytest.warns(UserWarning, match="a logger failed to log fake_quant_onnx: OSError:"):
        trainer(callback, max_epochs=1).fit(Net(), loader())
    assert "files" in manifest_is_true(tmp_path / "out")["fake_quant_onnx"]
