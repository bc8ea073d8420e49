"""How fast one tensor is quantized, over the card's speed of copying a tensor of the same size.

Bytes are those that must move: forward reads and writes the tensor and keeps a bit per element,
backward reads the gradient and the bits and writes. Time is the device's own: while a long product
keeps the device busy, all calls are queued behind it, so that Python costs nothing as long as
nothing waits for the device. A call that does wait is charged with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_qat import WeightSpec
from lightning_qat.numerics.fake_quantize import clamp_and_quantize, fake_quantize
from lightning_qat.numerics.learned_fake_quantize import learned_fake_quantize
from lightning_qat.numerics.qparams import IntegerGrid
from lightning_qat.quantizers.weight import WeightQuantizer

SIZES: Mapping[str, int] = {"64 MB": 64 << 20, "1 MB": 1 << 20}
"""Bytes of the tensor."""

NARROW = 256
"""What sizes are divided by where a CPU tries the script."""

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CALLS, WINDOWS = 10, 15
GRID = IntegerGrid(-128, 127)

Made: TypeAlias = tuple[list[Tensor], Callable[[], Tensor]]


class Case(NamedTuple):
    """One way to call the library on a tensor.

    Args:
        make: Takes the tensor; gives what receives a gradient, and a function that quantizes.
        forward: Bytes per element that forward writes besides the tensor.
        backward: How often backward reads or writes the whole tensor; 0: it passes the gradient on.
        bits: Backward needs a bit per element.
    """

    make: Callable[[Tensor], Made]
    forward: float = 0.0
    backward: int = 2
    bits: bool = True


def _quantized(**options: Any) -> Callable[[Tensor], Made]:
    def make(x: Tensor) -> Made:
        scale, zero_point = _number(x, 0.02), _number(x, 3.0)
        return [x], lambda: fake_quantize(x, scale, zero_point, GRID, **options)

    return make


def _clamped(x: Tensor) -> Made:
    scale, zero_point, ends = _number(x, 0.02), _number(x, -128.0), (0.0, float("inf"))
    return [x], lambda: clamp_and_quantize(x, ends, scale, zero_point, GRID)


def _learned(x: Tensor) -> Made:
    scale = _number(x, 0.02).requires_grad_()
    return [x, scale], lambda: learned_fake_quantize(x, scale, None, GRID, saves_input=True)


def _learned_with_low(x: Tensor) -> Made:
    scale, low = _number(x, 0.02).requires_grad_(), _number(x, -2.5).requires_grad_()
    return [x, scale, low], lambda: learned_fake_quantize(x, scale, low, GRID, saves_input=True)


def _weight(granularity: Any) -> Callable[[Tensor], Made]:
    def make(x: Tensor) -> Made:
        quantizer = WeightQuantizer(WeightSpec(granularity=granularity), 0).to(x.device)
        return [x], partial(quantizer, x)

    return make


def _torch_s(x: Tensor) -> Made:
    call: Any = torch.fake_quantize_per_tensor_affine
    return [x], lambda: call(x, 0.02, 3, GRID.qmin, GRID.qmax)


CASES: Mapping[str, Case] = {
    "fake_quantize": Case(_quantized()),
    "fake_quantize, observing": Case(_quantized(observe=lambda _: None)),
    "fake_quantize, compact": Case(_quantized(carries_int_repr=True), forward=1.0),
    "clamp_and_quantize (relu)": Case(_clamped),
    "learned_fake_quantize": Case(_learned, backward=3, bits=False),
    "learned_fake_quantize, lower end": Case(_learned_with_low, backward=3, bits=False),
    "WeightQuantizer, per channel": Case(_weight("per_channel"), backward=0, bits=False),
    "WeightQuantizer, per tensor": Case(_weight("per_tensor"), backward=0, bits=False),
    "torch.relu": Case(lambda x: ([x], partial(torch.relu, x)), backward=3, bits=False),
    "torch.fake_quantize": Case(_torch_s),
}
"""By name; the last two are torch's own, for comparison."""


def measured(jobs: list[tuple[str, str, str]], device: str, narrow: bool) -> Iterator[Any]:
    """In a row's process: the row of each job (size, dtype, case), one after the other."""
    for size, dtype, case in jobs:
        yield _row(SIZES[size] // (NARROW if narrow else 1), DTYPES[dtype], CASES[case], device)


def _row(size: int, dtype: torch.dtype, case: Case, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    element = dtype.itemsize
    elements = size // element
    rows = 1 << (elements.bit_length() - 1) // 2
    x = torch.randn(rows, elements // rows, device=device).to(dtype).requires_grad_()
    upstream, other = torch.rand_like(x), torch.empty_like(x)
    with torch.no_grad():
        copy = _seconds([lambda: other.copy_(x)] * CALLS, device)
    inputs, call = case.make(x)
    bit = 1 / 8 if case.bits else 0.0
    moved = elements * (2 * element + case.forward + bit)
    copied = 2 * size / copy
    row = {"copy": copied, "forward": moved / _seconds([call] * CALLS, device) / copied}
    if case.backward:
        backwards = [
            partial(torch.autograd.grad, call(), inputs, upstream, retain_graph=True)
            for _ in range(CALLS)
        ]
        moved = elements * (case.backward * element + bit)
        row["backward"] = moved / _seconds(backwards, device) / copied
    return row


def _number(x: Tensor, value: float) -> Tensor:
    return torch.tensor(value, device=x.device)


def _seconds(calls: Sequence[Callable[[], Any]], device: str) -> float:
    """Seconds per call: the median of several times all calls in a row."""
    for call in calls:
        call()
    window, count = (_on_device, WINDOWS) if device == "cuda" else (_on_cpu, 1)
    return statistics.median(window(calls) for _ in range(count)) / len(calls)


def _on_cpu(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def _on_device(calls: Sequence[Callable[[], Any]]) -> float:
    factor, busy = _long_product()
    torch.cuda.synchronize()
    queued = _on_cpu(calls)
    torch.cuda.synchronize()
    event: Any = torch.cuda.Event  # not typed
    start, end = event(enable_timing=True), event(enable_timing=True)
    for _ in range(1 + int(2 * queued / busy)):
        torch.mm(factor, factor)
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@cache
def _long_product() -> tuple[Tensor, float]:
    """A matrix whose square keeps the device busy, and for how many seconds."""
    factor = torch.ones(4096, 4096, device="cuda")

    def square() -> None:
        torch.mm(factor, factor)
        torch.cuda.synchronize()

    square()
    return factor, _on_cpu([square])
