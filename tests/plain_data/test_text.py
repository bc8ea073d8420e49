"""The text of a file: its size, its encoding."""

from pathlib import Path

import pytest

from lightning_qat.plain_data.text import read_text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_of_utf_8_is_no_text(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a").write_text("größe: 1", encoding=encoding)
    assert read_text(tmp_path / "a") == "größe: 1"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bits: 8".encode("utf-16"), r"must be UTF-8; it is UTF-16, as PowerShell's > writes it"),
        ("bits: 8".encode("utf-32"), "it is UTF-32"),
        (b"gr\xf6\xdfe: 1", r"must be text in UTF-8; byte 2 is 0xf6, which is not"),
        (b"x" * 101, r"must have at most 100 bytes.*it has 101"),
    ],
)
def test_another_encoding_and_a_larger_file_are_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(tmp_path / "a", most=100)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file is there"):
        read_text(tmp_path)
