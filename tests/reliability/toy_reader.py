"""A reader with one fault of every kind that the fuzzer tells apart."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

from reliability.fuzz.reader import Reader

KINDS = (b"fine", b"refused", b"undocumented", b"endless", b"fatal", b"greedy")


def _seeds(folder: Path) -> Sequence[Path]:
    path = folder / "whole.txt"
    path.write_bytes(b"fine")
    return [path]


def _read(path: Path) -> None:
    match path.read_bytes():
        case b"refused":
            raise ValueError("as documented")
        case b"undocumented":
            raise KeyError("a fault")
        case b"endless":
            while True:
                pass
        case b"fatal":
            os.abort()
        case b"greedy":
            bytearray(2**31)  # zeros that are never touched: no memory where no limit is


def mutate(content: bytes, generator: random.Random) -> bytes:
    return generator.choice(KINDS)


READER = Reader("toy", _seeds, mutate, _read, (ValueError,))
