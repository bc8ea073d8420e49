"""Folders for files that are being written: locked while their process lives, swept when not."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PREFIX = ".lightning-qat."
"""How the names of the folders begin; the machine follows, and random letters."""

STALE_SECONDS = 24 * 3600.0
"""Where no lock tells, a folder is left over when nothing in it has changed for a day."""

_NAME = re.compile(re.escape(PREFIX) + r"[0-9a-f]{8}\.[a-z0-9_]{8}")
_LOCK, _FILES = "lock", "files"
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """An empty folder below ``parent``, removed when the block ends.

    A killed process leaves its folder behind. The next one that writes below the same ``parent``
    removes it, as the system has released its lock; see ``sweep``.

    Args:
        parent: An existing folder.

    Raises:
        OSError: The folder cannot be made.
    """
    sweep(parent)
    folder, lock = _new_folder(parent)
    try:
        yield folder / _FILES
    finally:
        _remove(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep(parent: Path) -> tuple[Path, ...]:
    """Remove what killed processes have left of their work folders, and nothing else.

    A folder whose lock is held stays. So does one of another machine that shares the file system,
    or of one before a restart, and one without locks, until it is a day old: not every network
    file system passes locks on.

    Args:
        parent: Where to look; only directly in it.

    Returns:
        The folders that were removed. What cannot be removed is left without a word.
    """
    removed = []
    try:
        with os.scandir(parent) as entries:
            found = [entry for entry in entries if _NAME.fullmatch(entry.name)]
    except OSError:
        return ()
    for entry in found:
        try:
            ours = entry.is_dir(follow_symlinks=False)
            if hasattr(os, "geteuid"):
                ours = ours and entry.stat(follow_symlinks=False).st_uid == os.geteuid()
            if ours and _remove_abandoned(Path(entry.path)):
                removed.append(Path(entry.path))
        except OSError:
            continue
    return tuple(removed)


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{PREFIX}{_machine()}."))
        try:
            lock = _lock_new(folder)
            (folder / _FILES).mkdir()
        except FileNotFoundError:
            if not parent.is_dir():
                raise
            continue  # Another process took the empty folder for a leftover.
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, lock


def _lock_new(folder: Path) -> int | None:
    """Hold the lock of a new folder; ``None``: the file system has no locks.

    Raises:
        FileNotFoundError: The folder was swept before it was locked.
    """
    if fcntl is None:
        return None
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.stat(folder / _LOCK)
    except FileNotFoundError:
        os.close(lock)
        raise
    except OSError:
        # Without a lock file the folder's age decides.
        os.close(lock)
        (folder / _LOCK).unlink(missing_ok=True)
        return None
    return lock


def _remove_abandoned(folder: Path) -> bool:
    lock = None
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | _NO_FOLLOW)
    except FileNotFoundError:
        if not (folder / _FILES).exists():
            folder.rmdir()  # A process died before it locked; one that lives tries again.
            return True
    try:
        if lock is not None and not _is_free(lock):
            return False
        told = lock is not None and f".{_machine()}." in folder.name
        if not told and time.time() - _last_change(folder) < STALE_SECONDS:
            return False
        _remove(folder)
        return True
    finally:
        if lock is not None:
            os.close(lock)


def _remove(folder: Path, *, ignore_errors: bool = False) -> None:
    """The lock goes last: a process that is killed meanwhile leaves a folder that tells."""
    if (folder / _FILES).exists():
        shutil.rmtree(folder / _FILES, ignore_errors=ignore_errors)
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def _is_free(lock: int) -> bool:
    """Take a lock; ``False``: its process lives. A system without locks says ``True``."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _last_change(folder: Path) -> float:
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def _machine() -> str:
    """Short letters for this machine since it was started; locks of another one are not seen."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
    except OSError:
        import platform

        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]
