"""What a file that does not fit a model may raise, in one message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def compared(file: Path, model: Path) -> Iterator[None]:
    """Turn errors of a runtime, or of names that another model has, into ``ValueError``."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:  # runtimes raise many kinds
        raise ValueError(
            f"{str(file)!r} cannot be compared with {str(model)!r}: {type(error).__name__}: "
            f"{error}. Was it made of this model?"
        ) from error
