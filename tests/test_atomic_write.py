"""The old file or the new one, whatever the disk does; errors name the file."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_qat import atomic_write
from lightning_qat.atomic_write import late_errors, replacing


@pytest.fixture
def files_of_4_kb() -> Iterator[None]:
    """A limit of the system on what a file may hold; Python ignores the signal."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_in_the_block_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(UnicodeEncodeError, match="ordinal not in range"),
        replacing(tmp_path / "file") as temporary,
        temporary.open("w", encoding="ascii") as file,
    ):
        file.writelines(["ne", "half ß"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.usefixtures("files_of_4_kb")
def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"\[Errno 27\] File too large: '.*/out/file'$") as caught:
        with replacing(tmp_path / "out" / "file") as temporary:
            temporary.write_bytes(b"1" * 5000)
    assert caught.value.errno == errno.EFBIG
    assert list((tmp_path / "out").iterdir()) == []


def test_another_files_error_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="of another"), replacing(tmp_path / "file"):
        (tmp_path / "of another").read_text()


def test_what_the_disk_says_late_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Quotas and network file systems speak when the content is brought to the disk.
    def full(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(OSError, match=r"quota exceeded: '.*/file'"):
        with replacing(tmp_path / "file") as temporary:
            temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_in_the_way_is_named_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(IsADirectoryError, match=r"must be a file to write; it is a folder"):
        with replacing(tmp_path / "file"):
            raise AssertionError("it was written")


def test_an_old_file_is_never_beside_new_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net").write_text("old")
    real = os.replace
    seen = []

    def watched(source: Path, target: Path) -> None:
        real(source, target)
        seen.append({p.name: p.read_text() for p in tmp_path.iterdir() if p.is_file()})

    monkeypatch.setattr(atomic_write.os, "replace", watched)
    with replacing(tmp_path / "net") as temporary:
        temporary.write_text("new")
        temporary.with_name("net.data").write_text("data")
    assert seen == [{"net.data": "data"}, {"net": "new", "net.data": "data"}]


@pytest.mark.usefixtures("files_of_4_kb")
@pytest.mark.parametrize("sizes", [[5000], [100, 5000, 5000], [4000, 200]], ids=str)
def test_a_writer_that_cannot_bear_errors_sees_none(tmp_path: Path, sizes: list[int]) -> None:
    took = []
    with pytest.raises(OSError, match="File too large"), late_errors(tmp_path / "file") as file:
        took += [file.write(b"1" * size) for size in sizes]
    assert took == sizes


def test_a_patient_file_holds_what_was_written(tmp_path: Path) -> None:
    with late_errors(tmp_path / "file") as file:
        assert file.write(b"one ") == 4
        file.write(b"two")
        assert file.seek(0) == 0
    assert (tmp_path / "file").read_bytes() == b"one two"
