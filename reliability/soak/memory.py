"""What a process holds: pages, tensors, objects."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MB = 2**20


def resident() -> int:
    """Bytes of memory that the process has in RAM.

    Raises:
        OSError: The system has no ``/proc``.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> tuple[int, int]:
    """The number of tensors that Python reaches, and their bytes; storages are counted once.

    Fake tensors, which ``torch.export`` leaves behind, hold no bytes and count.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
    storages = {}
    for tensor in real:
        if tensor.layout is not torch.strided:
            continue
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper of torch.func that an earlier transform left
            continue
        storages[storage.data_ptr()] = storage.nbytes()
    return len(tensors), sum(storages.values())


def objects() -> Counter[str]:
    """Objects that the garbage collector tracks, by type; what is unreachable is freed first."""
    gc.collect()
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
