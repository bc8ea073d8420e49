"""All readers of an archive see the same parts, or it is refused."""

import io
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch

from lightning_qat.torch_files.parts import parts


def archive(*entries: tuple[str, bytes], how: int = zipfile.ZIP_STORED) -> io.BytesIO:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", how) as opened:
        warnings.filterwarnings("ignore", message="Duplicate name")
        for name, content in entries:
            opened.writestr(name, content)
    return file


VERSION = ("net/version", b"3\n")


def test_parts_are_what_torch_saved() -> None:
    file = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, file)
    found = parts(file)
    assert found["byteorder"].read(file) == b"little"
    assert np.frombuffer(found["data/0"].read(file), "<f4").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (archive(VERSION, ("net/a", b"1"), ("net/a", b"2")), "holds 'net/a' twice"),
        (archive(VERSION, ("net/a", b"1"), ("net/A", b"2")), "holds 'net/A' twice"),
        (archive(VERSION, ("net/a", b"1"), ("other/a", b"2")), "must lie in one folder; 'other/a'"),
        (archive(("version", b"3\n")), "must lie in one folder"),
        (archive(VERSION, ("net/a", b"1" * 99), how=zipfile.ZIP_DEFLATED), "it is compressed"),
        (archive(("net/a", b"1")), "torch cannot read it"),
        (io.BytesIO(b"PK\x03\x04"), "it is no archive"),
        (io.BytesIO(b""), "it is no archive"),
    ],
    ids=["twice", "case", "folders", "no folder", "compressed", "no version", "cut", "empty"],
)
def test_an_archive_that_can_be_read_in_two_ways_is_refused(file: io.BytesIO, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        parts(file)


def test_two_archives_in_one_file_are_refused() -> None:
    # zipfile takes what precedes the last archive for a program that unpacks it.
    both = io.BytesIO(archive(VERSION, ("net/a", b"1")).getvalue() + archive(VERSION).getvalue())
    assert zipfile.ZipFile(both).namelist() == ["net/version"]
    with pytest.raises(ValueError, match=r"torch cannot read it|readers see different parts"):
        parts(both)


def test_a_pickle_before_an_archive_is_refused() -> None:
    # torch.load looks at the first bytes alone, and unpickles what does not begin as an archive.
    file = io.BytesIO(pickle.dumps("what is loaded"))
    file.seek(0, 2)
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr(*VERSION)
    with pytest.raises(ValueError, match="it is no archive"):
        parts(file)


def test_a_part_outside_of_the_file_is_refused() -> None:
    content = bytearray(archive(VERSION).getvalue())
    at = content.rindex(b"PK\x05\x06")
    content[at + 16 : at + 20] = (2**20).to_bytes(4, "little")
    with pytest.raises(ValueError, match=r"it is no archive|outside of the file"):
        parts(io.BytesIO(bytes(content)))


def test_a_part_that_claims_the_file_and_more_is_refused() -> None:
    file = archive(VERSION, ("net/a", b"1234"))
    content = bytearray(file.getvalue())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = (2**30).to_bytes(4, "little") * 2
    with pytest.raises(ValueError, match="claim to be larger than the file"):
        parts(io.BytesIO(bytes(content)))
