"""What a process holds: pages, tensors, objects."""

from __future__ import annotations

import gc
import os
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

MB = 2**20

is_functional = torch._is_functional_tensor  # pyright: ignore[reportPrivateImportUsage]


def resident() -> int:
    """Bytes of memory that the process has in RAM.

    Raises:
        OSError: The system has no ``/proc``.
    """
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> tuple[int, int]:
    """The number of tensors that Python reaches, and their bytes; storages are counted once.

    Meta, fake and functional tensors, of which ``torch.export`` leaves some, count without bytes.
    """
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    storages = {}
    for tensor in tensors:
        if isinstance(tensor, FakeTensor | FunctionalTensor) or is_functional(tensor):
            continue
        if tensor.is_meta or tensor.layout is not torch.strided:
            continue
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a wrapper of torch.func that an earlier transform left
            continue
        # Not by the address of its data, which a storage without data refuses to give.
        storages[storage._cdata] = storage.nbytes()
    return len(tensors), sum(storages.values())


def objects() -> Counter[str]:
    """Objects that the garbage collector tracks, by type; what is unreachable is freed first."""
    gc.collect()
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())
