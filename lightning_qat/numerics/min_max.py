"""The smallest and largest value of a tensor of any strides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_qat.numerics.gpu import activations as gpu
from lightning_qat.numerics.kernels import loops as kernels
from lightning_qat.numerics.kernels.loops import ALL

_RUN = 64


def batch_range(
    x: Tensor, samples: int | None = None, ends: tuple[float, float] | None = None
) -> Tensor:
    """The range of one batch as ``(-min, max)``, float32.

    Both entries grow with the range, so the range over several calls, or over the processes of a
    distributed run, is an elementwise maximum of such pairs. NaN becomes infinity, which no maximum
    can lose.

    Args:
        x: Values of any shape and floating dtype, at least one element.
        samples: Look at no more than so many of them, 64 or more, in evenly spaced runs of 64
            neighbours in memory. The others may lie outside the range found, or not be finite.
        ends: Find the range that the values have after a clamp to these two.

    Returns:
        Shape ``(2,)``.

    Example:
        >>> batch_range(torch.tensor([-1.0, 3.0]))
        tensor([1., 3.])
    """
    everything = samples is None or x.numel() <= samples
    if everything:
        found = gpu.value_range(x, ends or ALL)
        if found is None:
            found = kernels.value_range(x, ends or ALL)
        if found is not None:
            return found
    values = _in_memory_order(x.detach())
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)  # torch has no extremes of 8-bit floats
    if samples is not None and not everything:
        values = _runs(values.reshape(-1), samples)
    low, high = torch.aminmax(values)
    if ends is not None:
        low, high = low.clamp(*ends), high.clamp(*ends)
    return (
        torch.stack((-low, high))
        .to(torch.float32)
        .nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    )


def channel_ranges(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each channel, NaN where it holds one.

    Args:
        x: float32.
        axis: The channel axis; ``None``: all values are one channel.

    Returns:
        Both ``(channels,)``, or scalars.

    Example:
        >>> channel_ranges(torch.tensor([[-1.0, 2.0], [0.5, 0.0]]), 0)
        (tensor([-1.,  0.]), tensor([2.0000, 0.5000]))
    """
    found = kernels.row_ranges(x) if axis == 0 else None
    if found is not None:
        return found
    rows = x.reshape(1, -1) if axis is None else x.transpose(0, axis).flatten(1)
    # Not aminmax, which takes 20 times as long along rows on CPUs; along an axis, which
    # torch.onnx.export can translate.
    low, high = rows.amin(1), rows.amax(1)
    return (low, high) if axis is not None else (low.reshape(()), high.reshape(()))


def _in_memory_order(x: Tensor) -> Tensor:
    """A view of the same values, contiguous where they fill their memory.

    Of transposed heads or channels last, ``aminmax`` would make a copy in the order of ``x``, which
    takes up to 20 times as long as its own pass.
    """
    if x.is_contiguous():
        return x
    # Not by ``sorted``: torch.compile cannot trace that where strides are symbols.
    order: list[int] = []
    for axis in range(x.dim()):
        place = 0
        while place < len(order) and x.stride(order[place]) >= x.stride(axis):
            place += 1
        order.insert(place, axis)
    return x.permute(order)


def _runs(flat: Tensor, samples: int) -> Tensor:
    """Evenly spaced runs of neighbours, ``(runs, 64)``: single values cost a memory line each."""
    return flat.unfold(0, _RUN, spacing(flat.numel(), samples // _RUN))


def spacing(values: int, samples: int) -> int:
    """The step at which at most so many samples spread over values.

    It shares no factor with any axis: a step of 16 over 256 features would see the same 16 of them
    again and again.
    """
    step = -(-values // samples)
    while _shared_factor(step, values) > 1:
        step += 1
    return step


def _shared_factor(a: int, b: int) -> int:
    """``math.gcd``, which torch.compile cannot trace where sizes are symbols."""
    while b:
        a, b = b, a % b
    return a


Observe = Callable[[Tensor], None]
"""A function that notes a ``(-min, max)``; see ``batch_range``."""
