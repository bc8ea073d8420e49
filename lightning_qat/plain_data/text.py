"""The text of a file from elsewhere: bounded, UTF-8, or a message that names the file."""

from __future__ import annotations

import codecs
from pathlib import Path

MOST_BYTES = 16 * 2**20
"""The largest file of plain data that is read; a recipe of 5,000 layers has 1 MB."""

_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16, as PowerShell's > writes it",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The bytes of a file that is not larger than a file of its kind can be.

    Raises:
        FileNotFoundError: There is no such file; a folder or a device is none.
        ValueError: It is larger.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There must be a file at {str(path)!r}; no file is there.")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(
            f"{str(path)!r} must have at most {most:,} bytes, as any file of its kind; it has "
            f"{path.stat().st_size:,}."
        )
    return data


def decoded(data: bytes, path: Path) -> str:
    """Bytes of a file as text; a byte order mark of UTF-8 is no part of it.

    Raises:
        ValueError: It is in another encoding; the message names the file and the encoding.

    Example:
        >>> decoded(b"bits: 8", Path("recipe.yaml"))
        'bits: 8'
    """
    for mark, name in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise ValueError(f"{str(path)!r} must be UTF-8; it is {name}. Save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} must be text in UTF-8; byte {error.start} is "
            f"0x{data[error.start]:02x}, which is not. Save it as UTF-8."
        ) from error


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """``decoded(read_bytes(path, most), path)``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is too large, or no text in UTF-8.
    """
    return decoded(read_bytes(path, most), path)
