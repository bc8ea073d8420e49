"""Files of named arrays, as `lightning-qat run --inputs` reads them."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_qat.export.named_arrays import read_arrays
from reliability.fuzz.mutate_archive import mutate_archive
from reliability.fuzz.mutate_bytes import mutate_bytes
from reliability.fuzz.reader import Reader


def _seeds(folder: Path) -> Sequence[Path]:
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.int64(3)}
    np.savez(folder / "plain.npz", **arrays)  # type: ignore[arg-type]
    np.savez_compressed(folder / "compressed.npz", **arrays)  # type: ignore[arg-type]
    return [folder / "plain.npz", folder / "compressed.npz"]


def _mutate(content: bytes, generator: random.Random) -> bytes:
    if generator.random() < 0.3:
        return mutate_bytes(content, generator)
    return mutate_archive(content, generator, lambda _, data, draw: mutate_bytes(data, draw))


READER = Reader("arrays", _seeds, _mutate, read_arrays, (ValueError, FileNotFoundError))
