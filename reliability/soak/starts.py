"""Processes that start at once and find no compiled loops: one compiles, and all compute right."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from lightning_qat.numerics.kernels.build import compiled_loops

PROCESSES = 8

_USE = """
import torch
from lightning_qat.numerics.fake_quantize import fake_quantize
from lightning_qat.numerics.kernels.build import compiled_loops
from lightning_qat.numerics.qparams import IntegerGrid
{before}
assert compiled_loops() is not None
x = torch.linspace(-9, 9, 10_001)
scale, zero = torch.tensor(0.05), torch.tensor(3, dtype=torch.int32)
ours = fake_quantize(x, scale, zero, IntegerGrid(-128, 127))
steps = (torch.round(x / scale) + zero).clamp(-128, 127)
assert torch.equal(ours, (steps - zero) * scale)
"""

_OTHER_USER = "import os; own = os.geteuid(); os.geteuid = lambda: own + 1"


@dataclass
class Started:
    """What processes did.

    Args:
        compiled: How often the compiler was called to compile.
        failed: Exit codes of those that ended otherwise than they should; others computed right.
        left: Files in the cache afterwards, without locks.
    """

    compiled: int
    failed: list[int] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Machine:
    """An empty cache, and a compiler that counts.

    Args:
        folder: Everything is below it.
        seconds: What the compiler takes longer than it does.
    """

    def __init__(self, folder: Path, seconds: float = 0.5) -> None:
        self.log, self.cache = folder / "compilers", folder / "cache"
        self.log.touch()
        wrapper = folder / "counting-cc"
        # The process that asks for the compiler is the parent of the wrapper.
        wrapper.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && exec gcc --version\n'
            f'echo $PPID >> "{self.log}"\nsleep {seconds}\nexec gcc "$@"\n'
        )
        wrapper.chmod(0o700)
        self.environment = os.environ | {"CC": str(wrapper), "XDG_CACHE_HOME": str(self.cache)}

    def start(self, before: str = "") -> subprocess.Popen[bytes]:
        """A process that uses the loops and checks a result; statements ``before`` come first."""
        command = [sys.executable, "-c", _USE.format(before=before)]
        return subprocess.Popen(command, env=self.environment)

    def compilers(self) -> list[int]:
        """Processes that have called the compiler, in turn."""
        return [int(line) for line in self.log.read_text(encoding="ascii").split()]

    def ended(self, processes: list[subprocess.Popen[bytes]], expected: int = 0) -> Started:
        """Wait for all.

        Raises:
            subprocess.TimeoutExpired: One hangs.
        """
        codes = [process.wait(timeout=600) for process in processes]
        left = [file.name for file in self.cache.rglob("*") if file.is_file()]
        return Started(
            len(self.compilers()),
            [code for code in codes if code != expected],
            [name for name in left if not name.endswith(".lock")],
        )


def at_once(folder: Path, processes: int = PROCESSES) -> Started:
    """All start with an empty cache: one compile."""
    machine = Machine(folder)
    return machine.ended([machine.start() for _ in range(processes)])


def killed(folder: Path, processes: int = PROCESSES) -> Started:
    """The one that compiles is killed; another compiles, and the others do not wait forever."""
    machine = Machine(folder, seconds=3)
    started = [machine.start() for _ in range(processes)]
    end = time.monotonic() + 600
    while not machine.compilers():
        if time.monotonic() > end:
            raise TimeoutError("No process called the compiler.")
        time.sleep(0.05)
    (first,) = machine.compilers()
    (victim,) = (process for process in started if process.pid == first)
    victim.kill()
    victim.wait()
    return machine.ended([process for process in started if process is not victim])


def without_cache(folder: Path, processes: int = PROCESSES) -> Started:
    """No cache can be made: each compiles for itself."""
    machine = Machine(folder)
    machine.cache.touch()
    return machine.ended([machine.start() for _ in range(processes)])


def two_users(folder: Path, processes: int = PROCESSES) -> Started:
    """Half of them are another user, whom the cache does not belong to: these compile alone."""
    machine = Machine(folder)
    users = ("", _OTHER_USER)
    return machine.ended([machine.start(users[index % 2]) for index in range(processes)])


CASES = {
    "start at once": (at_once, 1),
    "the one that compiles is killed": (killed, 2),
    "the cache cannot be written": (without_cache, PROCESSES),
    "half are another user": (two_users, 1 + PROCESSES // 2),
}
"""By name: the case, and how many compiles are right for ``PROCESSES``."""


def report_starts() -> bool:
    """Print a row for each case; whether all are right."""
    if compiled_loops() is None:
        print("No C compiler with OpenMP: nothing to compile at once.")
        return True
    print(f"| {PROCESSES} processes | compiles | expected | processes that failed | seconds |")
    print("|---|---|---|---|---|")
    right = True
    for name, (case, expected) in CASES.items():
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done = case(Path(folder))
        seconds = time.monotonic() - begin
        failed = len(done.failed)
        print(f"| {name} | {done.compiled} | {expected} | {failed} | {seconds:.0f} |", flush=True)
        right &= done.compiled == expected and not done.failed
    return right
