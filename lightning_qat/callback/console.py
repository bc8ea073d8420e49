"""Lines on the console that survive a progress bar; long lists go to a file."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info
from tqdm import tqdm  # type: ignore[import-untyped]

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
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FULL_LIST).write_text(whole + "\n", encoding="utf-8")
        say(f"{summary}\n  all of it: {folder / FULL_LIST}")


def say_interrupted(trainer: Trainer, module: str, targets: list[str], folder: object) -> None:
    """Say that an interrupted run exports nothing, and how its last checkpoint is exported."""
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    paths = [path for c in saved for path in (c.last_model_path, c.best_model_path) if path]
    lines = ["from lightning_qat import convert, export, load_qat_checkpoint"]
    if paths:
        lines.append(f"module = load_qat_checkpoint({module}, {paths[0]!r})")
    lines.append("quantized = convert(module, example_inputs)")
    prefix = str(Path(str(folder), module.lower()))
    lines += [f"export(quantized, {target!r}, {prefix!r})" for target in targets]
    what = (
        "The last checkpoint is exported by" if paths else "There is no checkpoint. In a notebook"
    )
    say("\n  ".join([f"interrupted, so nothing was exported. {what}:", *lines]))


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
