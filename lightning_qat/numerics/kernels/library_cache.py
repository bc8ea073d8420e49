"""Compiled libraries in the user's cache directory: built once for all processes of a machine.

The directory is ``lightning-qat`` below ``$XDG_CACHE_HOME`` or ``~/.cache``. Its files are code
that this process runs, so it must belong to the user and be closed to all others, and every file
carries a digest of itself: half a library would crash the process that loads it. Where any of that
fails, the library is built for this process alone.

``torch.utils.cpp_extension`` has such a cache as well, but needs ninja and a C++ compiler, takes
half a minute for torch's headers, and waits forever if a process that builds is killed.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

_DIGEST = hashlib.sha256
_DIGEST_SIZE = 32


def cached_library(key: str, compile_library: Callable[[], bytes]) -> ctypes.CDLL:
    """Load a shared library from the cache; build it first if it is not there.

    Of several processes that need it at once, one builds and the others wait.

    Args:
        key: Names everything that the library depends on; letters and digits.
        compile_library: Builds the library and returns the bytes of its file.

    Raises:
        OSError: The library does not load, or ``compile_library`` raises it.
    """
    path: Path | None = None
    with ExitStack() as stack:
        try:
            path = private_folder() / f"{key}.so"
            library = _load(path)
            if library is None:
                stack.enter_context(_locked(path.with_suffix(".lock")))
                library = _load(path)  # Another process may have built it meanwhile.
            if library is not None:
                return library
        except OSError as error:
            _say_not_kept(error)
            path = None
        binary = compile_library()
        if path is not None:
            try:
                _store(path, binary)
                library = _load(path)
                if library is not None:
                    return library
            except OSError as error:
                _say_not_kept(error)
    return _load_temporarily(binary)


def _say_not_kept(error: OSError) -> None:
    _log.warning(
        "The loops of quantizers cannot be kept for other processes, so each process compiles them "
        "anew when it starts, which takes about a second: %s. Name a directory of your own in the "
        "environment variable XDG_CACHE_HOME.",
        error,
    )


def private_folder() -> Path:
    """The cache directory, made if it is missing.

    Raises:
        OSError: It cannot be made, belongs to another user, or others may look into it.
    """
    if fcntl is None:
        raise OSError("this system has no file locks")
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # By the specification of XDG a relative path is to be ignored.
    base = configured if configured.is_absolute() else Path(os.path.expanduser("~/.cache"))
    if not base.is_absolute():
        raise OSError("there is no home directory")
    folder = base / "lightning-qat"
    base.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"{folder} is not a directory")
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise OSError(f"{folder} must belong to the user and be closed to others (mode 0700)")
    return folder


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes; the system releases that of a process that is killed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        assert fcntl is not None  # private_folder has refused a system without it
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _store(path: Path, binary: bytes) -> None:
    """Write a library with its digest behind it, which loaders ignore; at once or not at all.

    The lock is held: what else begins with this name was left by a process that was killed.
    """
    for left in path.parent.glob(f".{path.stem}*"):
        left.unlink(missing_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(binary + _DIGEST(binary).digest())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a library of this user whose digest is right; ``None``: there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            content = file.read()
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
            return None
        if _DIGEST(content[:-_DIGEST_SIZE]).digest() != content[-_DIGEST_SIZE:]:
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _load_temporarily(binary: bytes) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loops.so"
        path.write_bytes(binary)
        # Once loaded it needs no file.
        return ctypes.CDLL(str(path))
