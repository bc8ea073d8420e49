"""An exporter of a third party runs in our process: what it changes there is put back."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, TextIO

import torch


@dataclass
class Interrupts:
    """Whether someone asked this process to stop: then an exception is not the exporter's own."""

    arrived: bool = False


@contextmanager
def watched_interrupts() -> Iterator[Interrupts]:
    """Notice SIGINT (Ctrl-C) and SIGTERM; whoever handled them before still does."""
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield found  # Signals are raised in the main thread.
        return
    before: dict[int, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        found.arrived = True
        before[number](number, frame)

    for asked in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(asked)
        if callable(handler):
            before[asked] = handler
            signal.signal(asked, note)
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def same_process_after() -> Iterator[None]:
    """Afterwards: the current folder, standard output and error, and torch's modes, as before."""
    folder = None
    with suppress(OSError):
        folder = os.getcwd()
    streams = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    kept = {number: _duplicate(number) for number in (1, 2)}
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)
        if folder is not None:
            with suppress(OSError):
                os.chdir(folder)
        for number, copy in kept.items():
            if copy is not None:
                # Also where the number is another file's by now.
                os.dup2(copy, number)
                os.close(copy)
        for number, (name, stream) in enumerate(streams.items(), start=1):
            setattr(sys, name, _open(stream, number))


def _duplicate(number: int) -> int | None:
    try:
        return os.dup(number)
    except OSError:
        return None


def _open(stream: TextIO | None, number: int) -> TextIO | None:
    """The stream; if it was closed, another one to the same place."""
    if stream is None or not stream.closed:
        return stream
    return os.fdopen(os.dup(number), "w", encoding="utf-8", errors="replace")
