"""What killed processes leave is removed, and nothing else is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_qat import work_folder as module
from lightning_qat.work_folder import PREFIX, STALE_SECONDS, sweep, work_folder

WRITER = """
import sys, time
from pathlib import Path
from lightning_qat.work_folder import work_folder
with work_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("hal")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that is in the middle of writing."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def left(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(PREFIX)]


def make_old(folder: Path) -> None:
    before = time.time() - STALE_SECONDS - 1
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (before, before))


def test_the_folder_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with work_folder(tmp_path) as folder:
        assert list(folder.iterdir()) == []
        (folder / "file").touch()
    assert left(tmp_path) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(
    tmp_path: Path, writer: "subprocess.Popen[str]"
) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert len(left(tmp_path)) == 1
    with work_folder(tmp_path) as folder:
        assert left(tmp_path) == [folder.parent]


def test_a_folder_that_a_process_writes_to_stays_however_old_it_is(
    tmp_path: Path, writer: "subprocess.Popen[str]"
) -> None:
    (folder,) = left(tmp_path)
    make_old(folder)
    assert sweep(tmp_path) == ()
    assert (folder / "files" / "half").read_text() == "hal"


def test_this_process_does_not_sweep_its_own(tmp_path: Path) -> None:
    with work_folder(tmp_path) as one, work_folder(tmp_path) as other:
        assert one.is_dir()
        assert other.is_dir()


@pytest.mark.parametrize("kind", ["of another machine", "without a lock"])
def test_where_no_lock_tells_a_day_must_have_passed(tmp_path: Path, kind: str) -> None:
    name = f"{PREFIX}00000000.abcdefgh" if kind == "of another machine" else None
    with work_folder(tmp_path) as folder:
        one = folder.parent
        other = tmp_path / (name or one.name.replace(one.suffix, ".abcdefgh"))
        (other / "files").mkdir(parents=True)
    if kind == "of another machine":
        (other / "lock").touch()
    assert sweep(tmp_path) == ()
    make_old(other)
    assert sweep(tmp_path) == (other,)


def test_an_empty_folder_is_of_a_process_that_died_at_once(tmp_path: Path) -> None:
    early = tmp_path / f"{PREFIX}00000000.abcdefgh"
    early.mkdir()
    assert sweep(tmp_path) == (early,)


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, made = module.tempfile.mkdtemp, []

    def swept_at_once(**options: object) -> str:
        made.append(real(**options))  # type: ignore[call-overload]
        if len(made) == 1:
            Path(made[0]).rmdir()
        return str(made[-1])

    monkeypatch.setattr(module.tempfile, "mkdtemp", swept_at_once)
    with work_folder(tmp_path) as folder:
        assert folder.is_dir()
    assert len(made) == 2


@pytest.mark.parametrize(
    "name", [".lightning-qat.mine", ".lightning-qat.00000000.abcdefgh.bak", ".net.onnx.abcdefgh"]
)
def test_what_is_not_ours_stays(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "files").mkdir(parents=True)
    (tmp_path / f"{PREFIX}00000000.a_file_8").touch()
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / f"{PREFIX}00000000.a_link_8").symlink_to(target)
    for path in tmp_path.iterdir():
        make_old(path)
    before = sorted(tmp_path.rglob("*"))
    assert sweep(tmp_path) == ()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_folder_has_nothing_to_sweep(tmp_path: Path) -> None:
    assert sweep(tmp_path / "missing") == ()


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with work_folder(tmp_path) as folder:
        assert sweep(tmp_path) == ()
        assert folder.is_dir()
    assert left(tmp_path) == []


@pytest.mark.parametrize("victim", ["the writer", "the sweep"])
def test_a_process_that_is_killed_while_it_removes_a_folder_leaves_the_lock(
    victim: str, tmp_path: Path
) -> None:
    """A folder without a lock would stay for a day."""
    code = """
import os, pathlib, sys
from lightning_qat.work_folder import sweep, work_folder
parent, victim = pathlib.Path(sys.argv[1]), sys.argv[2]
unlink = os.unlink

def killed(*arguments, **options):
    unlink(*arguments, **options)
    os._exit(9)

block = work_folder(parent)
folder = block.__enter__()
for name in ("a", "b"):
    (folder / name).write_text("unfinished")
if victim == "the writer":
    os.unlink = killed
    block.__exit__(None, None, None)
os._exit(0)
"""
    arguments = [sys.executable, "-c", code, str(tmp_path), victim]
    writer = subprocess.run(arguments, check=False)
    assert writer.returncode == (9 if victim == "the writer" else 0)
    if victim == "the sweep":
        sweeping = code.partition("block =")[0] + "os.unlink = killed\nsweep(parent)"
        done = subprocess.run([*arguments[:2], sweeping, *arguments[3:]], check=False)
        assert done.returncode == 9
    (left,) = tmp_path.iterdir()
    assert (left / "lock").exists()
    assert sweep(tmp_path) == (left,)
    assert [*tmp_path.iterdir()] == []
