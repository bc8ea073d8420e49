"""A file of ``torch.save``, looked at before ``torch.load`` reads it."""

from __future__ import annotations

from collections.abc import Container
from typing import BinaryIO

from lightning_qat.model.torch_private import classes_said_to_be_safe
from lightning_qat.torch_files.parts import parts
from lightning_qat.torch_files.pickles import check_pickle


def check_saved(file: BinaryIO, allowed: Container[str] | None = frozenset()) -> None:
    """Refuse a file that is damaged, runs code, or takes more memory than its own size.

    Args:
        file: The open file; it is read from its beginning again afterwards.
        allowed: Dotted names of classes beside torch's own, and those that the program has named
            to ``torch.serialization.add_safe_globals``. ``None``: the file is trusted to run any
            code, and must only be whole.

    Raises:
        UnknownClass: It holds other classes.
        ValueError: It is damaged, or claims more than it has.
    """
    found = parts(file)
    if "data.pkl" not in found:
        raise ValueError("it holds no data.pkl")
    if "constants.pkl" in found:
        raise ValueError("it is a TorchScript archive")
    if allowed is not None:
        storages = {
            name.removeprefix("data/"): part.size
            for name, part in found.items()
            if name.startswith("data/")
        }
        safe = classes_said_to_be_safe()
        check_pickle(found["data.pkl"].read(file), storages, allowed or safe)
    file.seek(0)
