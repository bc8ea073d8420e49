"""Lines on the console that survive a progress bar; long lists go to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_info
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_qat.atomic_write import replacing

MOST_LINES = 40
"""Longer lists are summarised."""

FULL_LIST = "qat_plan.txt"


def say(text: str) -> None:
    """Log a line on the first process, above the progress bar if there is one."""
    with _above_progress_bars():
        rank_zero_info(f"QAT: {text}", stacklevel=5)


def say_list(text: str, summary: str, folder: Path | None, whole: str) -> None:
    """Log a list, or its summary where it is long and the whole stands in a file.

    Args:
        text: The list.
        summary: Its summary.
        folder: Where the file goes; ``None``: no file is written.
        whole: What the file holds.
    """
    if text.count("\n") < MOST_LINES:
        say(text)
    elif folder is None:
        say(f"{summary}\n  all of it: print(callback.report)")
    else:
        try:
            with replacing(folder / FULL_LIST) as temporary:
                temporary.write_text(whole + "\n", encoding="utf-8")
        except OSError as error:  # which the training does not depend on
            say(f"{summary}\n  {FULL_LIST} could not be written: {error}")
            return
        say(f"{summary}\n  all of it: {folder / FULL_LIST}")


@contextmanager
def _above_progress_bars() -> Iterator[None]:
    """Where loggers write meanwhile, progress bars are out of the way.

    Rich draws its bar anew over whatever was written to the terminal but through ``sys.stderr``,
    which it replaces; a logger keeps the stream it was made with. tqdm's line is cleared.
    """
    with ExitStack() as stack:
        stack.enter_context(tqdm.external_write_mode(file=sys.stderr))
        current = sys.stderr
        for name in ("", "lightning", "lightning.pytorch"):
            for handler in logging.getLogger(name).handlers:
                if not isinstance(handler, logging.StreamHandler):
                    continue
                stream = handler.stream
                if getattr(current, "rich_proxied_file", None) is stream:
                    handler.setStream(current)
                    stack.callback(handler.setStream, stream)
        yield
