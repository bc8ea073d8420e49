"""Which devices run the kernels, and how one is launched and counted."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from lightning_qat.numerics.kernels.build import RUN
from lightning_qat.numerics.transforms import is_transforming

OLDEST_TRITON = 3, 4
"""The first version that can round a division as IEEE 754 does on every device, by name."""

OLDEST_CARD = 8, 0
"""The compute capability from which on Triton is supported."""

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's interpreter runs the kernels, on CPUs: slowly, to test them."""


class Launch(NamedTuple):
    """One launch of a kernel, as ``count_launches`` notes it.

    Args:
        kernel: Its name.
        read: Bytes of tensors that it reads.
        written: Bytes of tensors that it writes.
    """

    kernel: str
    read: int
    written: int


class _Counting(threading.local):
    launches: list[Launch] | None = None


_COUNTING = _Counting()


@contextmanager
def count_launches() -> Iterator[list[Launch]]:
    """Note every launch in the block; tensors on the meta device take the way of the kernels.

    Nothing runs for those, so that the launches of any model are counted without a GPU.

        >>> import torch
        >>> from lightning_qat.numerics.gpu.activations import masked
        >>> grad = torch.empty(1000, device="meta")
        >>> bits = torch.empty(128, dtype=torch.uint8, device="meta")
        >>> with count_launches() as launches:
        ...     _ = masked(grad, bits, grad.shape, grad.stride())
        >>> launches
        [Launch(kernel='masked', read=4128, written=4000)]
    """
    before, _COUNTING.launches = _COUNTING.launches, []
    try:
        yield _COUNTING.launches
    finally:
        _COUNTING.launches = before


def suits(x: Tensor) -> bool:
    """Whether the kernels take a tensor: what it is, and where."""
    if x.is_cpu and not INTERPRETED:
        return False
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and type(x) in (Tensor, nn.Parameter)
        and not is_compiling()
        and not is_transforming()
        and not x.is_neg()  # A view whose memory holds the negated values.
        and runs_kernels(x.device)
    )


def runs_kernels(device: torch.device) -> bool:
    """Whether the kernels run on a device."""
    if device.type == "meta":
        return _COUNTING.launches is not None
    if device.type == "cpu":
        return INTERPRETED
    return device.type == "cuda" and why_not(device) is None


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on a device, and what to do; ``None``: they do. Asked once."""
    if device.type != "cuda":
        return f"there are no kernels for {device.type!r}"
    if torch.version.hip is not None:
        return "the kernels are tested on NVIDIA's cards only"
    if torch.cuda.get_device_capability(device) < OLDEST_CARD:
        name = torch.cuda.get_device_name(device)
        wanted = ".".join(map(str, OLDEST_CARD))
        return f"Triton needs compute capability {wanted}, which {name} does not have"
    try:
        triton = import_module("triton")
    except ImportError:
        return (
            "Triton is not installed. It comes with torch's CUDA builds on Linux; elsewhere "
            "install it with pip, in the version that torch.__version__ was built with"
        )
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        wanted = ".".join(map(str, OLDEST_TRITON))
        return (
            f"Triton {triton.__version__} is too old; install {wanted} or newer, best the version "
            "that torch was built with"
        )
    try:
        _try(device)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return (
            f"Triton cannot launch a kernel ({first}). It needs a C compiler at run time: install "
            "gcc, or name one in the environment variable CC"
        )
    return None


def _try(device: torch.device) -> None:
    """Launch the smallest kernel and look at its result.

    Raises:
        Exception: Whatever Triton raises.
        RuntimeError: The result is wrong.
    """
    grad = torch.ones(RUN, device=device)
    bits = torch.full((RUN // 8,), 1, dtype=torch.uint8, device=device)
    result = torch.empty_like(grad)
    launch("masked", 1, (grad, bits), (result,), [RUN], {"RUNS": 1})
    if result.sum().item() != RUN // 8:
        raise RuntimeError("its first result is wrong")


def launch(
    name: str,
    programs: int,
    reads: tuple[Any, ...],
    writes: tuple[Any, ...],
    numbers: Sequence[float],
    constants: Mapping[str, int],
    by_address: Sequence[Tensor] = (),
) -> None:
    """Launch a kernel, whose arguments are what it reads, writes, numbers and constants.

    Args:
        name: Of a function in ``kernels.py`` or ``weight_kernels.py``.
        programs: How many run; 0: nothing is launched.
        reads: Tensors that it reads, ``None`` where it does not.
        writes: Tensors that it writes, alike.
        numbers: Sizes and real numbers.
        constants: What it is compiled for.
        by_address: Tensors that it reads, whose addresses are in another one.
    """
    if not programs:
        return
    if _COUNTING.launches is not None:
        read, written = sum(map(_bytes, (*reads, *by_address))), sum(map(_bytes, writes))
        _COUNTING.launches.append(Launch(name, read, written))
    tensors = [t for t in (*reads, *writes) if t is not None]
    device = tensors[0].device
    if device.type == "meta":
        return
    # A pointer that is not looked at must be one all the same.
    given = [tensors[0] if t is None else t for t in (*reads, *writes)]
    kernel = getattr(_kernels(), name, None) or getattr(_weight_kernels(), name)
    if device.type == "cpu":
        kernel[(programs,)](*given, *numbers, **constants)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*given, *numbers, **constants, enable_fp_fusion=False)


def _bytes(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _kernels() -> ModuleType:
    return import_module("lightning_qat.numerics.gpu.kernels")


def _weight_kernels() -> ModuleType:
    return import_module("lightning_qat.numerics.gpu.weight_kernels")
