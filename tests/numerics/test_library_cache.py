"""The compiled loops are built once for all processes, and nothing is loaded that is not ours."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_qat.numerics.kernels import build, library_cache

pytestmark = pytest.mark.skipif(
    build.compiled_loops() is None or library_cache.fcntl is None,
    reason="no C compiler with OpenMP, or no file locks, on this machine",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the real compiler writes."""
    path = tmp_path_factory.mktemp("compiled") / "loops.so"
    path.write_bytes(build._compile(build._compiler()))
    return path


@pytest.fixture
def runs(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """An empty cache, and a compiler that counts how often it compiles."""
    log = tmp_path / "runs"
    log.touch()
    wrapper = tmp_path / "counting-cc"
    wrapper.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && exit\n'
        f'echo run >> "{log}"\n'
        "sleep 0.3\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'cp "{compiled}" "$2"\n'
    )
    wrapper.chmod(0o700)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: len(log.read_text().splitlines())


def load() -> bool:
    """Whether the loops load in a process that has not asked yet."""
    return build.compiled_loops.__wrapped__() is not None


def entry() -> Path:
    (found,) = library_cache.private_folder().glob("*.so")
    return found


_LOAD = (
    "from lightning_qat.numerics.kernels.build import compiled_loops\n"
    "assert compiled_loops() is not None"
)


def test_processes_at_once_compile_once(runs: Callable[[], int]) -> None:
    processes = [subprocess.Popen([sys.executable, "-c", _LOAD]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert runs() == 1
    assert load()
    assert runs() == 1


def test_what_a_killed_process_left_is_removed_by_the_next_that_builds(
    runs: Callable[[], int],
) -> None:
    assert load()
    left = entry().with_name(f".{entry().stem}abcdefgh")
    other = entry().with_name(".another_keyabcdefgh")
    left.touch()
    other.touch()
    entry().unlink()
    assert load()
    assert runs() == 2
    assert not left.exists()
    assert other.exists()  # Who writes it may live.


def test_other_flags_are_another_library(
    runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load()
    monkeypatch.setattr(build, "_FLAGS", f"{build._FLAGS} -DUNUSED")
    assert load()
    assert load()
    assert runs() == 2
    monkeypatch.setattr(build, "_cpu", lambda: "another processor")
    assert load()
    assert runs() == 3


@pytest.mark.parametrize("keep", [0, 10, 4096, -1])
def test_a_truncated_library_is_built_again(runs: Callable[[], int], keep: int) -> None:
    assert load()
    whole = entry().read_bytes()
    # A new file: this process has the old one loaded.
    entry().unlink()
    (library_cache.private_folder() / "part").write_bytes(whole[:keep])
    key = build._key(build._compiler())
    (library_cache.private_folder() / "part").rename(library_cache.private_folder() / f"{key}.so")
    assert load()
    assert runs() == 2
    assert len(entry().read_bytes()) == len(whole)


def test_a_changed_library_is_built_again(runs: Callable[[], int]) -> None:
    assert load()
    changed = bytearray(entry().read_bytes())
    changed[len(changed) // 2] ^= 1
    path = entry()
    path.unlink()
    path.write_bytes(changed)
    path.chmod(0o600)
    assert load()
    assert runs() == 2


def test_what_others_can_write_is_not_loaded(runs: Callable[[], int]) -> None:
    assert load()
    entry().chmod(0o666)
    assert load()
    assert runs() == 2
    target = library_cache.private_folder().parent / "elsewhere.so"
    entry().rename(target)
    key = build._key(build._compiler())
    (library_cache.private_folder() / f"{key}.so").symlink_to(target)
    assert load()
    assert runs() == 3
    assert not entry().is_symlink()


def test_what_belongs_to_another_user_is_not_loaded(
    runs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load()
    path, other = entry(), os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    assert library_cache._load(path) is None
    with pytest.raises(OSError, match="must belong to the user"):
        library_cache.private_folder()
    assert load()
    assert runs() == 2


def test_the_directory_is_private(runs: Callable[[], int]) -> None:
    before = os.umask(0)
    try:
        assert load()
    finally:
        os.umask(before)
    folder = library_cache.private_folder()
    assert folder.name == "lightning-qat"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.iterdir())
    folder.chmod(0o755)
    with pytest.raises(OSError, match="closed to others"):
        library_cache.private_folder()
    assert load()
    assert runs() == 2


def test_a_cache_that_cannot_be_written_is_done_without(
    runs: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load()
    assert load()
    assert runs() == 2


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert library_cache.private_folder() == tmp_path / ".cache/lightning-qat"
