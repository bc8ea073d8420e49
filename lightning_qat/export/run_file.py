"""Run a file on arrays of an ``.npz`` file, and write what it gives to another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable
from zipfile import ZipFile

import numpy as np

from lightning_qat.atomic_write import replacing
from lightning_qat.export.load import load_exporter
from lightning_qat.export.named_arrays import read_arrays
from lightning_qat.export.protocol import Array
from lightning_qat.out_of_memory import naming_memory_errors


@runtime_checkable
class RunsFiles(Protocol):
    """An exporter that runs files of its format, whoever wrote them."""

    @naming_memory_errors(
        "running the file",
        "Give it smaller inputs, or run it where there is more memory",
    )
    def run_file(self, path: str | Path, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run a file on a batch: outputs by name.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It cannot be run, or the inputs are not its own; all that is wrong is named.
        """
        ...


def run_file(model: Path, inputs: Path, out: Path) -> dict[str, Array]:
    """Run an ONNX file.

    Args:
        model: The file.
        inputs: ``.npz`` file with an array per input, by its name.
        out: ``.npz`` file to write, with an array per output.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The model cannot be run, or the inputs are not its own; all that is wrong is
            named. Nothing was written.
        OSError: ``out`` cannot be written.
    """
    target = load_exporter("cann")
    assert isinstance(target, RunsFiles)  # ours
    outputs = target.run_file(model, read_arrays(inputs))
    # As np.savez writes, which takes no output that is called "file".
    with replacing(out) as temporary, ZipFile(temporary, "w") as archive:
        for name, array in outputs.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return outputs
