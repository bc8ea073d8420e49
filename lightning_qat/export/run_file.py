"""Run a file on arrays of an ``.npz`` file, and write what it gives to another one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable
from zipfile import BadZipFile, ZipFile

import numpy as np

from lightning_qat.atomic_write import replacing
from lightning_qat.export.load import load_exporter
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


def read_arrays(path: Path) -> dict[str, Array]:
    """The arrays of an ``.npz`` file by name.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no file of named arrays.
    """
    try:
        with path.open("rb") as file:
            loaded = np.load(file)
            if isinstance(loaded, np.lib.npyio.NpzFile):
                return dict(loaded)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There must be an .npz file with the inputs at {str(path)!r}; no file is there."
        ) from error
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{_WANTED}; {str(path)!r} cannot be read ({error})") from error
    raise ValueError(f"{_WANTED}; {str(path)!r} is one array without a name")


_WANTED = "The inputs must be a file of named arrays, as np.savez('inputs.npz', name=array) writes"
