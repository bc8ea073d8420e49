"""Read a file of named arrays, as ``np.savez`` writes it: no pickles, no more than it stores."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast
from zipfile import ZipFile, ZipInfo, is_zipfile

import numpy as np

from lightning_qat.export.protocol import Array

MOST_BYTES = 2**33
"""Of all arrays of a file, in memory; a compressed file may declare a thousand times its size."""

_WANTED = "The inputs must be a file of named arrays, as np.savez('inputs.npz', name=array) writes"
_HEADERS: dict[tuple[int, int], Callable[[BinaryIO], Any]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of named arrays, an array is of Python objects or declares other
            sizes than are stored, or all together take more than ``MOST_BYTES``.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"There must be an .npz file with the inputs at {str(path)!r}; no file is there."
        )
    if not is_zipfile(path):
        with path.open("rb") as file:
            array = file.read(6) == np.lib.format.MAGIC_PREFIX
        told = "is one array without a name" if array else "cannot be read (it is no zip archive)"
        raise ValueError(f"{_WANTED}; {str(path)!r} {told}")
    try:
        with ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > MOST_BYTES:
                raise ValueError(f"its arrays take {total} bytes, more than {MOST_BYTES}")
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if name == member.filename:
                    raise ValueError(f"{name!r} in it is no array")
                if name in arrays:
                    raise ValueError(f"{name!r} is in it twice")
                arrays[name] = _read(archive, member, name)
            return arrays
    # zipfile, zlib and NumPy raise many kinds for a file that is broken.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of the file, and not of a place in it that is none
        raise ValueError(f"{_WANTED}; {str(path)!r} cannot be read ({error})") from error


def _read(archive: ZipFile, member: ZipInfo, name: str) -> Array:
    """An array whose header declares as many bytes as follow it."""
    with archive.open(member) as opened:
        file = cast(BinaryIO, opened)
        read_header = _HEADERS.get(np.lib.format.read_magic(file), _HEADERS[2, 0])
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError(f"{name!r} holds Python objects, which only a pickle can")
        stored = member.file_size - opened.tell()
    declared = math.prod(shape) * dtype.itemsize
    if declared != stored or min(shape, default=0) < 0:
        raise ValueError(f"{name!r} declares {declared} bytes ({list(shape)}) and has {stored}")
    with archive.open(member) as opened:
        array: Array = np.lib.format.read_array(opened, allow_pickle=False)
    return array
