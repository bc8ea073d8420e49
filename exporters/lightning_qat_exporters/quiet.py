"""Run a noisy library: one line of progress for the user, its own output kept for an error.

What both functions change belongs to the process, not to a thread: file descriptors, loggers,
warning filters. There is no narrower way, because the libraries print from C++, through loggers and
through ``warnings``. While they run, output of other threads vanishes as well, so keep the blocks
short; errors are exceptions and pass.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import BinaryIO


@contextmanager
def quietly(doing: str | None = None) -> Iterator[BinaryIO]:
    """Keep what a library prints, logs and warns away from the user.

    What it prints from C++ goes past ``sys.stderr``, so the file descriptors themselves are turned
    aside. Errors are exceptions and pass; so do log records of level ERROR.

    Args:
        doing: Shown meanwhile: as a spinner on a terminal, else as one line on standard error.

    Yields:
        The file that holds what was printed, for the text of an error.
    """
    with ExitStack() as stack:
        if doing is not None:
            stack.enter_context(_progress(doing))
        caught = stack.enter_context(tempfile.TemporaryFile())
        text = io.TextIOWrapper(os.fdopen(os.dup(caught.fileno()), "wb"), write_through=True)
        stack.enter_context(text)
        for number in (1, 2):
            stack.enter_context(_turned_aside(number, caught.fileno()))
        stack.enter_context(redirect_stdout(text))
        stack.enter_context(redirect_stderr(text))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(_logging_as_it_was())
        yield caught


@contextmanager
def without_remarks(
    logger: str, ignored: Iterable[tuple[str, type[Warning]]] = (), *, prints: bool = False
) -> Iterator[None]:
    """Keep one library's remarks away from the user; the whole process is affected meanwhile.

    Lighter than ``quietly``: file descriptors stay, and other libraries log and warn as before.
    Records of level ERROR pass. Handlers that the library puts on the root logger are removed.

    Args:
        logger: Name of the library's logger; its children are silenced too.
        ignored: Beginnings of warnings as regular expressions, with their categories.
        prints: Also keep what the library prints to ``sys.stdout`` from Python.
    """
    root, own = logging.getLogger(), logging.getLogger(logger)
    handlers, propagate, level = list(root.handlers), own.propagate, own.level
    errors = _ErrorsOf(own)
    own.addHandler(errors)
    own.propagate = False
    # For the library's own handlers; a child with a level of its own is held back by propagation.
    own.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            for message, category in ignored:
                warnings.filterwarnings("ignore", message, category)
            if prints:
                stack.enter_context(redirect_stdout(io.StringIO()))
            yield
    finally:
        own.setLevel(level)
        own.propagate = propagate
        own.removeHandler(errors)
        root.handlers[:] = handlers


class _ErrorsOf(logging.Handler):
    """Hands a logger's records of level ERROR and above to the handlers of its parent."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logging.ERROR)
        self._parent = logger.parent

    def emit(self, record: logging.LogRecord) -> None:
        if self._parent is not None:
            self._parent.callHandlers(record)


def last_lines(caught: BinaryIO, count: int = 5) -> str:
    """The last lines of what was printed."""
    caught.seek(0)
    lines = caught.read().decode(errors="replace").strip().splitlines()
    return "\n".join(lines[-count:])


@contextmanager
def _turned_aside(number: int, target: int) -> Iterator[None]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(number)
    os.dup2(target, number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


@contextmanager
def _logging_as_it_was() -> Iterator[None]:
    """Silence up to WARNING; a library that logs through the root logger leaves a handler there."""
    root, level = logging.getLogger(), logging.root.manager.disable
    handlers = list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
        for handler in root.handlers[:]:
            if handler not in handlers:
                root.removeHandler(handler)


@contextmanager
def _progress(doing: str) -> Iterator[None]:
    if not sys.stderr.isatty():
        print(doing, file=sys.stderr, flush=True)
        yield
        return
    # litert-torch depends on rich, so it is here whenever there is something to wait for.
    from rich.console import Console

    # A descriptor of its own: the usual one is turned aside meanwhile.
    with os.fdopen(os.dup(sys.stderr.fileno()), "w") as terminal:
        with Console(file=terminal).status(doing):
            yield
