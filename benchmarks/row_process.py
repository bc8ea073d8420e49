"""A process per row: what fails there costs that row, and what hangs is ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_preloaded = list[str]()
_start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

_LINES = 3
"""Of an error's text that a row keeps: compilers put what happened below a headline."""


class RowFailed(Exception):
    """A row cannot be measured; its text says why.

    Args:
        reason: One line.
        details: A traceback, or the last lines that the process printed.
        in_time: ``False``: the process was ended because its time was over.
    """

    def __init__(self, reason: str, details: str = "", *, in_time: bool = True) -> None:
        super().__init__(reason)
        self.details = details
        self.in_time = in_time


class RowProcess:
    """A process that takes one step of a generator whenever it is asked to.

    Args:
        target: A generator function of a module; each ``answer`` is what it yields next.
        arguments: Its arguments.

    Attributes:
        failed: It cannot go on.
    """

    def __init__(self, target: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        self.failed = False
        handle, name = tempfile.mkstemp(prefix="row-", suffix=".log")
        os.close(handle)
        self._log = Path(name)
        context: Any = multiprocessing.get_context(_start)
        if _start == "forkserver":
            # Before the first process; `benchmarks.step` names others when it is imported.
            context.set_forkserver_preload(_preloaded)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(target, arguments, theirs, name))
        self._process.start()
        theirs.close()  # so that its end is noticed

    def answer(self, until: float) -> Any:
        """What the generator yields next.

        Args:
            until: A time of ``time.monotonic`` at which to give up.

        Raises:
            RowFailed: It raised, the process died, or the time is over.
        """
        self.failed = True
        try:
            self._connection.send(True)
            if not self._connection.poll(max(until - time.monotonic(), 0.0)):
                raise RowFailed("not ready in time", self._printed(), in_time=False)
            done, answer, details = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            raise RowFailed(f"its process died (exit code {code})", self._printed()) from None
        if not done:
            raise RowFailed(answer, details)
        self.failed = False
        return answer

    @property
    def is_alive(self) -> bool:
        """Whether there is a process."""
        alive: bool = self._process.is_alive()
        return alive

    def _printed(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def stop(self) -> None:
        """End the process, and the compilers that it has started."""
        if not self.failed:
            self._connection.send(False)
            self._process.join(10)
        if self._process.is_alive():
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except (AttributeError, OSError):  # no such call, or not yet a group of its own
                self._process.kill()
        self._process.join()
        self._connection.close()
        self._log.unlink(missing_ok=True)


def preload(*modules: str) -> None:
    """Import modules once for all processes that start from now on.

    Nothing of them may touch a device, see ``choose_start``, or start threads.
    """
    _preloaded[:] = modules


def choose_start(touches: Callable[[], Iterator[Any]], seconds: float = 60.0) -> str:
    """Fall back from ``forkserver`` to the slower ``spawn`` if a process cannot use the device.

    A process that has used CUDA cannot be forked, and some torch may use it when it is imported.

    Args:
        touches: A generator function that uses the device.
        seconds: The time that it has.

    Returns:
        How processes start from now on.
    """
    global _start
    process = RowProcess(touches)
    try:
        process.answer(time.monotonic() + seconds)
    except RowFailed:
        _start = "spawn"
    finally:
        process.stop()
    return _start


def reason(error: BaseException) -> str:
    """The type of an error and the first lines of its text, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:_LINES])}"[:300]


def _run(target: Callable[..., Iterator[Any]], arguments: Any, connection: Any, log: str) -> None:
    if hasattr(os, "setsid"):
        os.setsid()
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        answers = target(*arguments)
        while connection.recv():
            connection.send((True, next(answers), ""))
    except EOFError:
        return  # nobody asks any more
    except Exception as error:
        connection.send((False, reason(error), traceback.format_exc()[-4000:]))
