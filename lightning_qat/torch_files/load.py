"""Load a file of ``torch.save``, or say in one kind of error what is wrong with it."""

from __future__ import annotations

import pickle
from collections.abc import Container
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lightning_qat.torch_files.pickles import AnyClass, UnknownClass, is_known
from lightning_qat.torch_files.saved import check_saved

_SHOWN = 300


def load_saved(path: str | Path, *, weights_only: bool = True) -> Any:
    """What a file holds; its tensors stay in the file until they are used.

    Args:
        path: The file.
        weights_only: Load tensors and plain values alone. ``False``: the file is trusted to run
            code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a folder, something else than a file of ``torch.save``, cut off or
            damaged; or it holds objects and ``weights_only`` is set. The message says which, and
            what to do.
    """
    require_saved(path, frozenset() if weights_only else None)
    return _loaded(path, weights_only=weights_only)


def load_without_objects(path: str | Path) -> Any:
    """As ``load_saved``; an object of another class is replaced by one that does nothing.

    No code of the file runs, and none needs to be trusted for its weights.
    """
    require_saved(path, AnyClass())
    reader = SimpleNamespace(Unpickler=_Unpickler, load=None, __name__="pickle")
    return _loaded(path, weights_only=False, pickle_module=reader)


def require_saved(path: str | Path, allowed: Container[str] | None = frozenset()) -> None:
    """Refuse what ``load_saved`` refuses, before anything is made of it.

    Args:
        path: The file.
        allowed: As of ``check_saved``.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(_of_folder(file))
    if not file.is_file():
        raise FileNotFoundError(f"There must be a checkpoint at {str(path)!r}; no file is there.")
    with file.open("rb") as opened:
        start = opened.read(64)
        if not start.startswith(b"PK"):
            raise ValueError(f"{str(path)!r} must be a whole checkpoint; {_of_start(start)}")
        try:
            check_saved(opened, allowed)
        except UnknownClass as error:
            raise UntrustedObjects(str(path), error.names) from None
        except ValueError as error:
            raise _damaged(path, str(error)) from error


class UntrustedObjects(ValueError):
    """A whole file that holds objects, which nobody has said to trust.

    Args:
        path: The file.
        names: The dotted names of their classes, and of functions that make them.
    """

    def __init__(self, path: str, names: tuple[str, ...]) -> None:
        last = [name.rpartition(".") for name in names]
        imports = "; ".join(f"from {module} import {name}" for module, _, name in last)
        classes = ", ".join(name for _, _, name in last)
        super().__init__(
            f"{path!r} is whole, but it holds {', '.join(names)}: objects such as hyperparameters "
            "of these classes. Loading them runs code that the file names. If you trust the file, "
            "pass weights_only=False. If you trust these classes with whatever the file gives "
            f"them, name them first: {imports}; torch.serialization.add_safe_globals([{classes}])."
        )
        self.names = names


def _loaded(path: str | Path, **options: Any) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, **options)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # unpicklers, and classes of the file's own, raise many kinds
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, AttributeError | ImportError):
            raise ValueError(
                f"{str(path)!r} must hold objects that this program can make; {reason}. Import or "
                "define the class under the name that it had where the file was written."
            ) from error
        raise _damaged(path, reason) from error


def _damaged(path: str | Path, reason: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} must be a whole checkpoint; torch could not read it: {reason[:_SHOWN]}. It "
        "was cut off or damaged; use an earlier one."
    )


def _of_start(start: bytes) -> str:
    """What a file is that is no archive, by its first bytes."""
    if not start:
        return "it is empty. It was cut off; use an earlier one."
    if start.lstrip()[:1] == b"<":
        return "it is a web page. Download the file itself, not the page that shows it."
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer to it. Fetch the file: git lfs pull."
    if start.startswith((b"\x80\x02\x8a\x0al\xfc\x9cF\xf9", b"\x80\x02ctorch")):
        return (
            "it is of torch's format before 1.6. If you trust it, write it anew: "
            "torch.save(torch.load(path, weights_only=False), path)."
        )
    return "it is something else than what torch.save writes."


def _of_folder(folder: Path) -> str:
    names = {file.name for file in folder.iterdir()}
    if ".metadata" in names:
        what = "a folder, as sharded strategies write checkpoints. Make one file of it: "
        what += "python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER"
    elif "latest" in names or "checkpoint" in names or "zero_to_fp32.py" in names:
        what = "a folder of DeepSpeed. Make one file of it: from lightning.pytorch.utilities."
        what += "deepspeed import convert_zero_checkpoint_to_fp32_state_dict as convert; "
        what += "convert(FOLDER, 'float.ckpt')"
    else:
        files = sorted(name for name in names if name.endswith((".ckpt", ".pt", ".pth")))
        what = f"a folder; name a file. It holds {', '.join(files[:6]) or 'no checkpoint'}"
    return f"{str(folder)!r} is {what}."


class _Inert:
    """Stands for an object of any class: takes what a pickle gives it, and does nothing."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: Any, **_named: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_arguments: Any, **_named: Any) -> _Inert:
        return self

    def append(self, value: Any) -> None:
        """Of a list."""

    def extend(self, values: Any) -> None:
        """Of a list."""

    add = append


class _Unpickler(pickle.Unpickler):
    """Makes what torch writes for tensors and plain values, and inert objects of all else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class or function of a name."""
        return super().find_class(module, name) if is_known(module, name) else _Inert
