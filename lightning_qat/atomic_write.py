"""Write files so that a reader sees the old one or the new one, never half of one."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from typing_extensions import Buffer, override

from lightning_qat.work_folder import work_folder


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well.

    The temporary file stands in a folder of its own, so that a writer may put more files beside it
    (external data); all files of that folder are moved. Their content is on the disk before.

    Args:
        path: The file to write; its folder is made when it is missing.

    Raises:
        OSError: The folder cannot be written to, the disk is full, or ``path`` is a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} must be a file to write; it is a folder.")
    with work_folder(path.parent) as folder, _errors_name(path, folder):
        temporary = folder / path.name
        yield temporary
        # The file itself last: whoever sees it finds what it refers to.
        written = sorted(folder.iterdir(), key=lambda p: p.name == path.name)
        for file in written:
            _flush(file)
        if len(written) > 1:
            # Never an old file with new data beside it, not even when the process is killed here.
            path.unlink(missing_ok=True)
        for file in written:
            os.replace(file, path.with_name(file.name))


@contextmanager
def late_errors(path: Path) -> Iterator[BinaryIO]:
    """A file to write whose errors are raised when the block ends.

    For writers that cannot bear them: torch's C++ writer ends the whole process when the disk is
    full (``terminate called after throwing an instance of 'c10::Error'``).

    Args:
        path: The file.

    Raises:
        OSError: The first error of a write.
    """
    file = path.open("wb")
    patient = _Patient(file)
    try:
        yield patient  # type: ignore[misc]
    finally:
        try:
            file.close()
        except OSError as error:
            patient.error = patient.error or error
    if patient.error is not None:
        raise patient.error


class _Patient(io.RawIOBase):
    """Writes to a file until that fails, and then takes what comes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    @override
    def writable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        # torch asks, and goes to the beginning when all is written.
        return True

    @override
    def seek(self, offset: int, whence: int = 0, /) -> int:
        return 0

    @override
    def write(self, data: Buffer, /) -> int:
        size = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self.error = error
        return size


@contextmanager
def _errors_name(path: Path, folder: Path) -> Iterator[None]:
    """Errors of the system name the file that was to be written, not the one in ``folder``."""
    try:
        yield
    except OSError as error:
        elsewhere = error.filename is not None and str(folder) not in str(error.filename)
        if error.errno is None or elsewhere:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _flush(path: Path) -> None:
    """Bring a file to the disk: quotas and network file systems report a full disk only then."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
