"""The folder of the exports, looked at before the training: can it be written, is there room."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer

from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat.work_folder import sweep

RESCUE_PREFIX = "qat_unfinished_export_"
"""Beginning of the folder that holds the model when the export folder cannot."""


def folder_problem(folder: Path) -> str | None:
    """Why files cannot be written to the export folder; ``None``: they can.

    It is made if it is missing, and what a killed run has left in it is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return (
            f"The export directory {str(folder)!r} must be writable: {error}. Choose another one "
            "with export_dir."
        )
    return None


def space_warning(folder: Path, pl_module: LightningModule, targets: int) -> str | None:
    """A warning that the export folder's disk is too full for the files; ``None``: there is room.

    The estimate is one copy of the parameters for the converted model and one for each target:
    some targets take a quarter of that, others write two files.
    """
    size = sum(p.numel() * p.element_size() for p in pl_module.parameters())
    needed = size * (targets + 1)
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed:
            return (
                f"{str(folder)!r} has {free / 1e6:.1f} MB of free space; the exports will need "
                f"about {needed / 1e6:.1f} MB. Make room until training ends, or choose another "
                "directory with export_dir."
            )
    return None


def rescued(model: QuantizedModel, name: str, trainer: Trainer) -> Path | None:
    """Save a converted model somewhere else, because the export folder refuses it.

    Args:
        model: The model.
        name: Its file's name.
        trainer: Its folder is the first choice, then the current one, then that for temporary
            files.

    Returns:
        The file, in a new folder; ``None``: no place took it.
    """
    for place in (trainer.default_root_dir, os.curdir, tempfile.gettempdir()):
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix=RESCUE_PREFIX, dir=Path(place).absolute()))
            try:
                model.save(folder / name)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return folder / name
    return None
