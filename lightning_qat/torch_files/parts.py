"""The parts of an archive, where all who read it see the same ones.

torch reads zip archives with a reader of its own, which finds names whatever their case, below the
folder of the first one. A file that Python's zipfile and torch's reader see differently would be
checked as one thing and loaded as another.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from lightning_qat.model.torch_private import archive_records

_SIGNATURE = b"PK\x03\x04"
_LOCAL_HEADER = 30
_ENCRYPTED = 1


@dataclass(frozen=True)
class Part:
    """Where a part lies in its file.

    Args:
        name: Its name below the archive's folder.
        offset: Of its first byte in the file.
        size: In bytes.
    """

    name: str
    offset: int
    size: int

    def read(self, file: BinaryIO) -> bytes:
        """Its content."""
        file.seek(self.offset)
        return file.read(self.size)


def parts(file: BinaryIO) -> Mapping[str, Part]:
    """The parts of an archive of torch by their names below its folder; nothing is unpacked.

    Args:
        file: The open archive.

    Raises:
        ValueError: It is no archive; a part is compressed or encrypted, or larger than the file;
            two have one name; not all lie in one folder; or torch's reader sees others.
    """
    file.seek(0)
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        # torch.load would take it for a pickle, whatever else is in the file.
        raise ValueError("it is no archive")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise ValueError(f"it is no archive: {error}") from error
    size = file.seek(0, 2)
    if not all(0 <= entry.header_offset < size for entry in entries):
        raise ValueError("its parts claim to lie outside of the file")
    found: dict[str, Part] = {}
    names: set[str] = set()
    folders: set[str] = set()
    for entry in entries:
        folder, _, name = entry.filename.partition("/")
        folders.add(folder)
        if not folder or not name or len(folders) > 1:
            raise ValueError(
                f"all of it must lie in one folder; {entry.filename!r} does not lie in "
                f"{min(folders)!r}"
            )
        if name.lower() in names:
            raise ValueError(f"it holds {entry.filename!r} twice")
        names.add(name.lower())
        found[name] = Part(name, _offset(file, entry), _stored_size(entry))
    if sum(part.size for part in found.values()) > size:
        raise ValueError("its parts claim to be larger than the file")
    _require_same(file, found)
    return found


def _stored_size(entry: zipfile.ZipInfo) -> int:
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
    if not stored or entry.flag_bits & _ENCRYPTED:
        raise ValueError(f"{entry.filename!r} must be stored as it is; it is compressed")
    return entry.file_size


def _offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return entry.header_offset + _LOCAL_HEADER + name + extra


def _require_same(file: BinaryIO, found: Mapping[str, Part]) -> None:
    file.seek(0)
    try:
        records = archive_records(file)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch cannot read it: {reason}") from error
    file.seek(0)
    if records != {part.name: (part.offset, part.size) for part in found.values()}:
        raise ValueError("its table of contents must say one thing; readers see different parts")
