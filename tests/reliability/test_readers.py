"""The short form of ``python -m reliability.fuzz``: some broken files for every reader."""

import signal
import warnings
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="the fuzzer limits memory as Unix does")

from reliability.fuzz.reader import load_reader
from reliability.fuzz.readers import READERS
from reliability.fuzz.worker import make_input, try_input, write_seeds

INPUTS = 20
PACKAGES = {"tflite": "ai_edge_litert", "lightning_config": "jsonargparse"}
"""What seeds of a reader are made with."""


@pytest.mark.parametrize("name", sorted(READERS))
def test_broken_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    reader = load_reader(READERS[name])
    wake = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seeds = write_seeds(reader, tmp_path)
            for index in range(INPUTS):
                content, suffix = make_input(reader, seeds, seed=21, index=index)
                path = tmp_path / f"input{suffix}"
                path.write_bytes(content)
                error = try_input(reader, path, limit_s=60)
                if error is not None and not isinstance(error, reader.refusals):
                    raise error
    finally:
        signal.signal(signal.SIGALRM, wake)
