"""Files of named arrays: nothing in them runs, and none takes more memory than it stores."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest

from lightning_qat.export.named_arrays import read_arrays


def npy(header: str, data: bytes = b"") -> bytes:
    """An array of that header."""
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    with ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in members:
            file.writestr(name, content)
    return path


def test_what_numpy_writes_is_read(tmp_path: Path) -> None:
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.int8(3), "c": np.zeros((0, 2))}
    np.savez(tmp_path / "plain.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(tmp_path / "small.npz", **arrays)  # type: ignore[arg-type]
    for name in ("plain.npz", "small.npz"):
        for key, array in read_arrays(tmp_path / name).items():
            np.testing.assert_array_equal(array, arrays[key])


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (8589934592, 1024)}", "declares 35184"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", r"declares -4 bytes"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", "holds Python objects"),
        ("{'descr': '<f4'}", "cannot be read"),
        ("(" * 100, "cannot be read"),
        ("[" + "1," * 30000 + "]", "cannot be read"),
    ],
)
def test_a_header_that_is_not_what_is_stored_is_refused(
    header: str, said: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "x.npz", ("x.npy", npy(header, b"\0" * 8)))
    with pytest.raises(ValueError, match=f"The inputs must be a file of named arrays.*{said}"):
        read_arrays(path)


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="holds Python objects, which only a pickle can"):
        read_arrays(archive(tmp_path / "x.npz", ("x.npy", buffer.getvalue())))


def test_what_is_no_array_and_names_that_come_twice_are_refused(tmp_path: Path) -> None:
    content = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)}", b"\0" * 4)
    with pytest.raises(ValueError, match="'readme' in it is no array"):
        read_arrays(archive(tmp_path / "x.npz", ("readme", b"")))
    with pytest.raises(ValueError, match="'x' is in it twice"):
        read_arrays(archive(tmp_path / "y.npz", ("x.npy", content), ("x.npy", content)))
