"""A process that gives a reader one broken file after the other.

The parent reads counts from a pipe, and the number of the input in work from shared memory, so that
an input that ends the process, or never ends, is known too.
"""

import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from types import FrameType
from typing import Any

from reliability.fuzz.reader import Reader, load_reader

REPORT_EVERY_S = 0.5


class TooLong(BaseException):
    """An input took longer than the limit. No ``except Exception`` of the reader takes it."""


@dataclass
class Found:
    """An input that the reader neither read nor refused as documented."""

    index: int
    place: str
    """Kind of exception and the last line of ours that it passed."""
    detail: str
    content: bytes
    suffix: str


@dataclass
class Counts:
    """What became of the inputs since the last report."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    found: list[Found] = field(default_factory=list)
    peak_bytes: int = 0


def make_input(
    reader: Reader, seeds: list[tuple[str, bytes]], seed: int, index: int
) -> tuple[bytes, str]:
    """Return the content and the suffix of an input, which follow from its number alone."""
    generator = random.Random(f"{reader.name} {seed} {index}")
    suffix, content = seeds[generator.randrange(len(seeds))]
    return reader.mutate(content, generator), suffix


def write_seeds(reader: Reader, folder: Path) -> list[tuple[str, bytes]]:
    """Write the whole files, check that the reader takes each, and return suffixes and contents.

    Raises:
        ValueError: The reader makes no file, or refuses a whole one.
    """
    paths = list(reader.seeds(folder))
    if not paths:
        raise ValueError(f"Reader {reader.name!r} must make at least one whole file; it made none.")
    for path in paths:
        try:
            reader.read(path)
        except reader.refusals as error:
            raise ValueError(
                f"Reader {reader.name!r} refuses its whole file {path.name}: {error}"
            ) from error
    return [("".join(path.suffixes), path.read_bytes()) for path in paths]


def try_input(reader: Reader, path: Path, limit_s: float) -> BaseException | None:
    """Let the reader read the file; return what it raised."""
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        reader.read(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return None


def place_of(error: BaseException) -> str:
    """Return the kind of an exception and the last line of our packages that it passed."""
    lines = [
        f"{frame.filename.rpartition('lightning_qat')[2].lstrip('/')}:{frame.lineno}"
        for frame in traceback.extract_tb(error.__traceback__)
        if "lightning_qat" in frame.filename
    ]
    return f"{type(error).__name__} at {lines[-1] if lines else '?'}"


def work(
    module: str,
    folder: Path,
    seed: int,
    indices: range,
    limit_s: float,
    memory_bytes: int,
    current: "Synchronized[int]",
    results: Connection,
) -> None:
    """Try the inputs of ``indices``, and send `Counts` every half second and at the end."""
    warnings.simplefilter("ignore")  # of mutated values; the tests look at warnings
    signal.signal(signal.SIGALRM, _end_input)
    reader = load_reader(module)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = write_seeds(reader, folder)
    _limit_memory(memory_bytes)
    counts, reported = Counts(), time.monotonic()
    results.send(counts)  # ready: from here on the parent watches the clock
    for index in indices:
        current.value = index
        content, suffix = make_input(reader, seeds, seed, index)
        path = folder / f"input{suffix}"
        path.write_bytes(content)
        error = try_input(reader, path, limit_s)
        if error is None:
            counts.accepted += 1
        elif isinstance(error, reader.refusals):
            counts.refused[type(error).__name__] += 1
        else:
            detail = "".join(traceback.format_exception(error))
            counts.found.append(Found(index, place_of(error), detail, content, suffix))
        del error
        # What is found is sent at once: the next input may end the process.
        if counts.found or time.monotonic() - reported > REPORT_EVERY_S:
            counts.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            results.send(counts)
            counts, reported = Counts(), time.monotonic()
    counts.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.send(counts)
    results.send(None)


def _end_input(signal_number: int, frame: FrameType | None) -> Any:
    raise TooLong("longer than the limit")


def _limit_memory(more_bytes: int) -> None:
    """Let the process have so much more data than it has now; beyond it, MemoryError."""
    if sys.platform != "linux":
        return
    status = Path("/proc/self/status").read_text()
    kilobytes = next(
        int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData")
    )
    limit = kilobytes * 1024 + more_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
