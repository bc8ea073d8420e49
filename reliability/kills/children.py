"""Processes that share what this one has imported: forks, each of which can be killed."""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        signal: What killed it; 0: nothing did.
        code: Its exit code.
        told: Seconds until it called ``tell``; ``None``: it did not.
        seconds: Seconds until it ended.
    """

    signal: int
    code: int
    told: float | None
    seconds: float


def in_child(
    work: Callable[[Callable[[], None]], object],
    log: Path,
    kill: tuple[int, float, bool] | None = None,
) -> Ended:
    """Run a function in a fork of this process, and perhaps kill it.

    Args:
        work: Called with a function ``tell`` that it may call once.
        log: Where its output goes.
        kill: The signal, after how many seconds, and whether these count from ``tell`` on.
    """
    reader, writer = os.pipe()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _be_child(work, log, writer)
    os.close(writer)
    told = None
    try:
        due = None if kill is None or kill[2] else began + kill[1]
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            now = time.monotonic()
            if told is None and _readable(reader):
                told = now - began
                if kill is not None and kill[2]:
                    due = now + kill[1]
            if kill is not None and due is not None and now >= due:
                os.kill(child, kill[0])
                if kill[0] != signal.SIGKILL:
                    due = now + 120  # One that does not end is sent the signal again.
                else:
                    due = None
            time.sleep(0.002)
    finally:
        os.close(reader)
    return Ended(
        os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
        os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
        told,
        time.monotonic() - began,
    )


def value_of(function: Callable[[], Any], log: Path) -> Any:
    """What a function returns, computed in a child, so that this process stays as it is.

    Raises:
        RuntimeError: It failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer"
        ended = in_child(lambda tell: answer.write_text(json.dumps(function())), log)
        if ended.code != 0:
            raise RuntimeError(f"{log.read_text()[-2000:]}")
        return json.loads(answer.read_text())


def _readable(reader: int) -> bool:
    return bool(select.select([reader], [], [], 0)[0]) and os.read(reader, 1) == b"!"


def _tell(writer: int) -> None:
    os.write(writer, b"!")


def _be_child(work: Callable[[Callable[[], None]], object], log: Path, writer: int) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work(partial(_tell, writer))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
