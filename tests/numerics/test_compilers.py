"""Every value of ``CC`` gives loops with right numbers, or torch's operations and a line on why."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.kernels import build, library_cache, loops
from lightning_qat.numerics.qparams import IntegerGrid

pytestmark = pytest.mark.skipif(
    build.compiled_loops() is None or os.name != "posix",
    reason="no C compiler with OpenMP on this machine",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the real compiler writes."""
    path = tmp_path_factory.mktemp("compiled") / "loops.so"
    path.write_bytes(build._compile(build._compiler()))
    return path


def load() -> bool:
    """Whether the loops load in a process that has not asked yet."""
    return build.compiled_loops.__wrapped__() is not None


def script(path: Path, *lines: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o700)
    return path


def copying(compiled: Path) -> tuple[str, ...]:
    """The lines of a compiler that writes a library which is there already."""
    return (
        '[ "$1" = --version ] && exit',
        'while [ "$1" != -o ]; do shift; done',
        f'cp "{compiled}" "$2"',
    )


REAL = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang") or ""
GOOD: dict[str, Callable[[Path, Path], str]] = {
    "empty": lambda _folder, _compiled: "",
    "blank": lambda _folder, _compiled: "   ",
    "a path with spaces": lambda folder, compiled: str(
        script(folder / "my tools" / "cc", *copying(compiled))
    ),
    "a quoted path with spaces and an argument": lambda folder, compiled: (
        f"'{script(folder / 'my tools' / 'cc', 'shift', *copying(compiled))}' -m64"
    ),
    "a wrapper and a compiler": lambda folder, _compiled: (
        str(script(folder / "ccache", 'exec "$@"')) + f" {REAL}"
    ),
    "warnings": lambda folder, compiled: str(
        script(folder / "cc", "echo loops.c:1: warning: no error >&2", *copying(compiled))
    ),
    "output that is no text": lambda folder, compiled: str(
        script(folder / "cc", r"printf '\377\376'", *copying(compiled))
    ),
    "options for speed": lambda _folder, _compiled: f"{REAL} -ffast-math -Ofast",
}


@pytest.mark.parametrize("kind", GOOD)
def test_a_compiler_is_found_however_it_is_named(
    kind: str, compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", GOOD[kind](tmp_path, compiled))
    assert load()


BAD: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "missing": (lambda _folder, _compiled: "no-such-cc -m64", "looked for no-such-cc -m64"),
    "no words": (lambda _folder, _compiled: "gcc 'x", "cannot be read"),
    "fails": (
        lambda folder, _compiled: str(script(folder / "cc", "echo fatal error: no >&2; exit 3")),
        "could not compile loops.c: fatal error: no",
    ),
    "writes nothing": (
        lambda folder, _compiled: str(script(folder / "cc", "exit 0")),
        "could not compile loops.c: it said nothing",
    ),
    "writes no library": (
        lambda folder, _compiled: str(
            script(
                folder / "cc",
                '[ "$1" = --version ] && exit',
                'while [ "$1" != -o ]; do shift; done; echo x > "$2"',
            )
        ),
        "loops.so",
    ),
    "is no program": (lambda folder, _compiled: str(no_program(folder)), "Exec format error"),
    "another architecture": (
        lambda folder, compiled: str(
            script(folder / "cc", *copying(foreign(folder / "foreign.so", compiled)))
        ),
        "loops.so",
    ),
    "lacks a loop": (
        lambda folder, _compiled: (
            str(script(folder / "cc", "shift", f'exec {REAL} -Drestore=other "$@"')) + " x"
        ),
        "lacks restore",
    ),
    "takes NaN for impossible": (
        lambda folder, _compiled: str(
            script(folder / "cc", f'exec {REAL} "$@" -ffinite-math-only -ffast-math')
        ),
        "other numbers",
    ),
    "multiplies instead of dividing": (
        lambda folder, _compiled: str(
            script(folder / "cc", f'exec {REAL} "$@" -funsafe-math-optimizations')
        ),
        "other numbers",
    ),
    "hangs": (
        lambda folder, _compiled: str(script(folder / "cc", "sleep 60 & sleep 60")),
        "took more than 0.5 seconds",
    ),
}


def no_program(folder: Path) -> Path:
    path = folder / "cc"
    path.write_bytes(b"\x00\x01")
    path.chmod(0o700)
    return path


def foreign(path: Path, compiled: Path) -> Path:
    """A library whose header names another processor."""
    changed = bytearray(compiled.read_bytes())
    changed[18:20] = (243).to_bytes(2, "little")  # RISC-V
    path.write_bytes(changed)
    return path


@pytest.mark.parametrize("kind", BAD)
def test_without_a_compiler_that_works_one_line_says_why_and_what_is_slower(
    kind: str,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    make, why = BAD[kind]
    named = make(tmp_path, compiled)
    monkeypatch.setenv("CC", named)
    monkeypatch.setattr(build, "_SECONDS_TO_ANSWER", 0.5)
    began = time.monotonic()
    assert not load()
    # Half a minute less than the processes that a hanging compiler has started.
    assert time.monotonic() - began < 30
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "same numbers but slower" in line
    assert why in line
    assert repr(named) in line
    assert "\n" not in line
    # GCC before 13 has a library made with -ffast-math flush them when it is loaded.
    assert float(torch.tensor(1e-40) * 1.0) != 0.0


def test_without_loops_the_numbers_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(1000)
    numbers = torch.tensor(0.1), torch.tensor(3.0), IntegerGrid(-128, 127)
    expected = fake_quantize(x, *numbers)
    monkeypatch.setattr(loops, "compiled_loops", lambda: None)
    assert torch.equal(fake_quantize(x, *numbers), expected)


def read_only(base: Path) -> None:
    (base / "lightning-qat").touch()


def of_others(base: Path) -> None:
    (base / "lightning-qat").mkdir()
    (base / "lightning-qat").chmod(0o777)


UNUSABLE: dict[str, Callable[[Path], None]] = {
    "a file in its place": read_only,
    "open to others": of_others,
}


@pytest.mark.parametrize("kind", [*UNUSABLE, "full", "no home"])
def test_a_cache_that_cannot_be_used_is_said_once_and_costs_a_compilation(
    kind: str,
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", str(script(tmp_path / "cc", *copying(compiled))))
    base = tmp_path / "cache"
    base.mkdir()
    if kind in UNUSABLE:
        UNUSABLE[kind](base)
    elif kind == "full":

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(library_cache, "_store", full)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert load()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert "each process compiles them anew" in line
    assert "XDG_CACHE_HOME" in line
    assert not Path("~").exists()
