"""Compile ``loops.c`` with the machine's C compiler and load it."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from ctypes import c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("loops.c")

BLOCK = 4096
"""Values that one thread takes at a time; a learned grid's sums come per block."""

RUN = 512
"""So many values share bytes of bits."""

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
"""Of each loop, between the sizes of the tensor and the number of threads."""


@functools.cache
def compiled_loops() -> ctypes.CDLL | None:
    """The compiled loops, where there are any; asked once."""
    try:
        library, compiler = _compile()
        for name, arguments in _ARGUMENTS.items():
            loop = getattr(library, name)
            loop.argtypes, loop.restype = [_SIZE, _SIZE, *arguments, c_int], None
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning(
            "Quantizers run as several operations of torch each, with the same numbers but slower: "
            "%s. Install gcc, or name a C compiler with OpenMP in the environment variable CC.",
            error,
        )
        return None
    _log.info("Quantizers run as loops that %s has compiled.", compiler)
    return library


def _compile() -> tuple[ctypes.CDLL, str]:
    """Compile and load.

    Raises:
        OSError: There is no compiler, it refused, or its result does not load.
    """
    named = os.environ.get("CC")
    compilers = [named] if named else ["gcc", "cc", "clang"]
    compiler = next((name for name in compilers if shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise FileNotFoundError(f"no C compiler was found (looked for {', '.join(compilers)})")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "kernels.so"
        command = [*shlex.split(compiler), *_FLAGS.split(), str(_SOURCE), "-o", str(result), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["it said nothing"]
            why = next((line for line in said if "error" in line), said[0])
            raise OSError(f"{compiler} could not compile {_SOURCE.name}: {why}")
        # Once loaded it needs no file.
        return ctypes.CDLL(str(result)), compiler
