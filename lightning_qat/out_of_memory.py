"""Errors of memory, said as what they are: what ran out, while what was done, and how to go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SAID = (
    "can't allocate memory",  # torch on CPUs, by DefaultCPUAllocator
    "not enough memory",  # the same on Windows
    "out of memory",  # CUDA, where it is no torch.OutOfMemoryError
    "failed to allocate memory",  # ONNX Runtime
    "unable to allocate",  # NumPy
    "bad_alloc",  # C++
    "bad allocation",
)


EXPORT_LATER = (
    "A trained checkpoint can be exported later, where there is more memory: "
    "lightning-qat export CHECKPOINT --module ... --to ..."
)


class OutOfMemory(MemoryError):
    """The memory of the machine, or of a device, was not enough."""


def memory_error_in(error: BaseException) -> BaseException | None:
    """The error of memory that an exception is, or that it was raised from; ``None``: neither.

    Example:
        >>> memory_error_in(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
        >>> memory_error_in(RuntimeError("shapes differ"))
    """
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, MemoryError | torch.OutOfMemoryError):
            return found
        if any(said in str(found).lower() for said in _SAID):
            return found
        found = found.__cause__ or found.__context__
    return None


@contextmanager
def naming_memory_errors(doing: str, remedy: str) -> Iterator[None]:
    """Raise ``OutOfMemory`` for every error of memory; other errors pass.

    Args:
        doing: What is done, after "while": ``"converting the model"``.
        remedy: What the user can do, as sentences.

    Raises:
        OutOfMemory: An error of memory was raised, which is its cause.
    """
    try:
        yield
    except OutOfMemory:
        raise  # By the innermost, which knows best what was done.
    except Exception as error:
        cause = memory_error_in(error)
        if cause is None:
            raise
        raise OutOfMemory(
            f"Memory ran out while {doing} ({_first_line(cause)}). {remedy}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
