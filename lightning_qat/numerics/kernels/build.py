"""Compile ``loops.c`` with the machine's C compiler, once for all processes, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from lightning_qat.numerics.kernels.check_numbers import check_numbers, subnormals_stay
from lightning_qat.numerics.kernels.library_cache import cached_library

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("loops.c")

BLOCK = 4096
"""The number of values that one thread takes at a time; sums of gradients come per block."""

RUN = 512
"""The number of values whose bits share bytes; see ``pack_run`` in ``loops.c``."""

# Rounding as torch's: no contraction, no reordering but where a pragma asks for it.
_FLAGS = (
    "-O3 -march=native -shared -fPIC -fopenmp -fno-fast-math -ffp-contract=off -fno-math-errno "
    f"-fno-trapping-math -DBLOCK={BLOCK} -DRUN={RUN}"
)

_TENSOR, _SIZE, _NUMBER, _FLAG = c_void_p, c_int64, c_float, c_int

_ARGUMENTS: dict[str, list[Any]] = {
    "fake_quantize": [
        *[*[_TENSOR] * 3, _NUMBER, _NUMBER, _TENSOR, _NUMBER, _TENSOR, _NUMBER, _NUMBER],
        *[_TENSOR, _NUMBER, _NUMBER],
    ],
    "value_range": [_TENSOR, _TENSOR, _NUMBER, _NUMBER],
    "row_ranges": [_TENSOR] * 3,
    "learned_backward": [*[_TENSOR] * 4, *[_NUMBER] * 4, _FLAG, c_double, c_double, *[_TENSOR] * 3],
    "bits_between": [_TENSOR, _TENSOR, _NUMBER, _NUMBER],
    "masked": [_TENSOR] * 3,
    "restore": [_TENSOR, _FLAG, _TENSOR, _TENSOR, _NUMBER],
}
"""Argument types of each loop, without the two sizes in front and the thread count at the end."""


_SECONDS_TO_ANSWER = 20
_SECONDS_TO_COMPILE = 120


@functools.cache
def compiled_loops() -> ctypes.CDLL | None:
    """The compiled loops; ``None`` if there is no C compiler. Asked for once per process."""
    try:
        compiler = _compiler()
        with subnormals_stay():
            library = cached_library(_key(compiler), lambda: _compile(compiler))
        _declare(library)
        check_numbers(library)
    except OSError as error:
        _log.warning(
            "Quantizers run as several operations of torch each, with the same numbers but slower: "
            "%s. Install gcc, or name a C compiler with OpenMP in the environment variable CC%s.",
            error,
            f", which is {os.environ['CC']!r}" if os.environ.get("CC") else "",
        )
        return None
    _log.info("Quantizers run as loops that %s has compiled.", shlex.join(compiler))
    return library


def _compiler() -> list[str]:
    """The compiler and its first arguments, as ``CC`` names them or as they are found.

    Raises:
        OSError: There is none.
    """
    named = os.environ.get("CC", "").strip()
    if not named:
        candidates = [["gcc"], ["cc"], ["clang"]]
    elif shutil.which(named):
        candidates = [[named]]  # A path with spaces, which a shell would split.
    else:
        try:
            candidates = [shlex.split(named)]
        except ValueError as error:
            raise OSError(f"the C compiler that CC names cannot be read ({error})") from None
    for candidate in candidates:
        if shutil.which(candidate[0]):
            return candidate
    looked_for = ", ".join(shlex.join(candidate) for candidate in candidates)
    raise FileNotFoundError(f"no C compiler was found (looked for {looked_for})")


def _key(compiler: list[str]) -> str:
    """A digest of everything that the library depends on."""
    version = _run([*compiler, "--version"], _SECONDS_TO_ANSWER)[1].encode()
    path = os.path.realpath(shutil.which(compiler[0]) or compiler[0])
    texts = (path, *compiler, *_FLAGS.split(), _cpu())
    parts = (_SOURCE.read_bytes(), version, *(text.encode() for text in texts))
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def _cpu() -> str:
    """What ``-march=native`` depends on; a home directory may serve different machines."""
    telling = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU ", "Features")
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} of {platform.node()}"
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(telling))])


def _compile(compiler: list[str]) -> bytes:
    """Compile the loops, and return the file of the shared library.

    Raises:
        OSError: The compiler refused, or wrote nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "loops.so"
        command = [*compiler, *_FLAGS.split(), str(_SOURCE), "-o", str(result), "-lm"]
        status, output = _run(command, _SECONDS_TO_COMPILE)
        if status or not result.is_file():
            said = output.strip().splitlines() or ["it said nothing"]
            why = next((line for line in said if "error" in line), said[0])
            raise OSError(f"{shlex.join(compiler)} could not compile {_SOURCE.name}: {why}")
        return result.read_bytes()


def _run(command: list[str], seconds: float) -> tuple[int, str]:
    """The exit status of a command, and what it has said.

    Raises:
        OSError: It does not start, or takes longer; what it has started is ended as well.
    """
    # Into a file: of a pipe the end would only come with that of every process that has it open.
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds)
        except BaseException as error:
            _end(process)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise OSError(f"{shlex.join(command[:2])} took more than {seconds} seconds") from None
        output.seek(0)
        return status, output.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and those that it has started."""
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _declare(library: ctypes.CDLL) -> None:
    """Tell ctypes the arguments of every loop.

    Raises:
        OSError: A loop is missing.
    """
    for name, arguments in _ARGUMENTS.items():
        loop = getattr(library, name, None)
        if loop is None:
            raise OSError(f"the library that the C compiler has written lacks {name}")
        loop.argtypes, loop.restype = [_SIZE, _SIZE, *arguments, c_int], None
