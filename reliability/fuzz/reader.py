"""What the fuzzer has to know of one reader of files."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path


@dataclass(frozen=True)
class Reader:
    """A function that reads a file, and how to make whole and broken files for it.

    Args:
        name: What the command line calls it.
        seeds: Writes whole files into a folder and returns their paths. Files that they refer to
            may lie beside them. Every call writes the same files.
        mutate: Breaks the content of a file. What it draws comes from the generator, so that the
            number of an input makes that input again.
        read: What a user calls. It may finish, or raise one of ``refusals``.
        refusals: The documented errors.
    """

    name: str
    seeds: Callable[[Path], Sequence[Path]]
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...]


def load_reader(module: str) -> Reader:
    """Import the reader that a module has under the name ``READER``.

    Raises:
        TypeError: The module has no such value.
    """
    reader = getattr(import_module(module), "READER", None)
    if not isinstance(reader, Reader):
        raise TypeError(f"{module} must have a Reader under the name READER; got {reader!r}.")
    return reader
