"""Give a reader broken files in processes of their own, and count what becomes of them."""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from reliability.fuzz.reader import load_reader
from reliability.fuzz.worker import Counts, Found, make_input, work, write_seeds

HANG_S = 10.0
"""An input may take so long."""
MEMORY_BYTES = 2 * 2**30
"""A process may take so much more memory than after its start."""
START_S = 300.0
"""A process may take so long until its first input: it imports torch and makes whole files."""


@dataclass
class Outcome:
    """What became of the inputs of one reader."""

    reader: str
    seconds: float = 0.0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    found: dict[str, list[Found]] = field(default_factory=dict)
    """By place."""
    peak_bytes: int = 0

    @property
    def inputs(self) -> int:
        """How many files the reader was given."""
        return self.accepted + self.refused.total() + sum(map(len, self.found.values()))

    @property
    def hangs(self) -> int:
        """How many inputs took longer than the limit."""
        return sum(len(found) for place, found in self.found.items() if place.startswith("TooLong"))

    def add(self, counts: Counts) -> None:
        """Add what a process reports."""
        self.accepted += counts.accepted
        self.refused += counts.refused
        self.peak_bytes = max(self.peak_bytes, counts.peak_bytes)
        for found in counts.found:
            self.found.setdefault(found.place, []).append(found)


@dataclass
class _Worker:
    process: BaseProcess
    results: Connection
    current: Any
    indices: range
    ready: bool = False
    last_index: int = -1
    last_change: float = field(default_factory=time.monotonic)


def fuzz(
    module: str,
    folder: Path,
    *,
    count: int | None = None,
    seconds: float | None = None,
    seed: int = 0,
    jobs: int = 1,
    hang_s: float = HANG_S,
    memory_bytes: int = MEMORY_BYTES,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> Outcome:
    """Give a reader broken files until ``count`` of them are read or ``seconds`` are over.

    A process that ends, or that no alarm wakes, is a finding, and another goes on after its input.

    Args:
        module: Module of the `Reader`.
        folder: Where the processes write their files.
        count: How many inputs.
        seconds: How long, without the start of the processes.
        seed: Other seeds make other inputs.
        jobs: How many processes.
        hang_s: How long one input may take.
        memory_bytes: How much memory a process may take beyond what it has at its start.
        progress: Called with what is known so far, about twice a second.

    Raises:
        RuntimeError: A process failed before its first input: the reader itself is broken.
    """
    outcome = Outcome(load_reader(module).name)
    last = count if count is not None else 2**62
    context = multiprocessing.get_context("spawn")

    def start(indices: range, job: int) -> _Worker:
        receiver, sender = context.Pipe(duplex=False)
        current = context.Value("q", -1)
        process = context.Process(
            target=work,
            args=(module, folder / str(job), seed, indices, hang_s, memory_bytes, current, sender),
            daemon=True,
        )
        process.start()
        sender.close()
        return _Worker(process, receiver, current, indices)

    workers = {job: start(range(job, last, jobs), job) for job in range(jobs)}
    began: float | None = None
    try:
        while workers:
            wait([worker.results for worker in workers.values()], timeout=0.5)
            now = time.monotonic()
            for job, worker in list(workers.items()):
                finished = _receive(worker, outcome)
                if worker.ready and began is None:
                    began = now
                if finished:
                    worker.process.join()
                    del workers[job]
                elif _is_stuck(worker, hang_s, now) or not worker.process.is_alive():
                    _receive(worker, outcome)
                    index = _end(worker, outcome, module, folder / str(job), seed)
                    workers[job] = start(range(index + jobs, last, jobs), job)
            outcome.seconds = now - began if began is not None else 0.0
            progress(outcome)
            if seconds is not None and outcome.seconds >= seconds:
                break
    finally:
        for worker in workers.values():
            worker.process.kill()
            worker.process.join()
    return outcome


def _receive(worker: _Worker, outcome: Outcome) -> bool:
    """Add what a process has sent; return whether it is at its end."""
    try:
        while worker.results.poll():
            counts = worker.results.recv()
            if counts is None:
                return True
            if not worker.ready:
                worker.ready, worker.last_change = True, time.monotonic()
            outcome.add(counts)
    except EOFError:
        pass
    return False


def _is_stuck(worker: _Worker, hang_s: float, now: float) -> bool:
    """Return whether an input runs on although its alarm has rung, as native code can."""
    if worker.current.value != worker.last_index:
        worker.last_index, worker.last_change = worker.current.value, now
    limit = hang_s + 5 if worker.ready else START_S
    return now - worker.last_change > limit


def _end(worker: _Worker, outcome: Outcome, module: str, folder: Path, seed: int) -> int:
    """End a process that ended itself or is stuck; its input is found; return its number."""
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
        place = "TooLong in native code"
    else:
        code = worker.process.exitcode or 0
        place = f"process ended with {signal.Signals(-code).name if code < 0 else code}"
    index = int(worker.current.value)
    if not worker.ready or index < 0:
        raise RuntimeError(f"Reader {outcome.reader!r} failed before its first input: {place}.")
    reader = load_reader(module)
    folder.mkdir(parents=True, exist_ok=True)
    content, suffix = make_input(reader, write_seeds(reader, folder), seed, index)
    # What the process had read since its last report is not counted.
    outcome.add(Counts(found=[Found(index, place, place, content, suffix)]))
    return index
