"""The weight of a transposed convolution, as LiteRT's kernels want it.

TRANSPOSE_CONV knows neither groups nor dilation. Zeros between the integers stand for both: the
same sums, of more terms.
"""

from __future__ import annotations

from torch import Tensor

from lightning_qat.numerics.qparams import QParams


def dense(integers: Tensor, groups: int, dilation: list[int]) -> Tensor:
    """A weight of one group without dilation that computes the same.

    Args:
        integers: ``(in, out / groups, *kernel)``.
        groups: As in torch.
        dilation: Per axis of the kernel.

    Returns:
        ``(in, out, *kernel)``.
    """
    inputs, outputs, *kernel = integers.shape
    wide = [(size - 1) * by + 1 for size, by in zip(kernel, dilation, strict=True)]
    whole = integers.new_zeros(inputs, groups * outputs, *wide)
    steps = tuple(slice(None, None, by) for by in dilation)
    for group in range(groups):
        rows = slice(group * inputs // groups, (group + 1) * inputs // groups)
        columns = slice(group * outputs, (group + 1) * outputs)
        whole[(rows, columns, *steps)] = integers[rows]
    return whole


def dense_scale(qparams: QParams, groups: int) -> Tensor:
    """One scale per output channel: the groups share theirs."""
    return qparams.scale if qparams.axis is None else qparams.scale.repeat(groups)


def dense_like(integers: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """The dense weight of a shape that has the same integers, and its groups.

    Returns:
        ``None`` when no groups and dilation give that shape.
    """
    inputs, outputs, *kernel = integers.shape
    if len(shape) != integers.dim() or shape[0] != inputs or shape[1] % outputs:
        return None
    dilation = []
    for size, wide in zip(kernel, shape[2:], strict=True):
        by, rest = divmod(wide - 1, size - 1) if size > 1 else (1, wide - 1)
        if rest or by < 1:
            return None
        dilation.append(by)
    groups = shape[1] // outputs
    return None if inputs % groups else (dense(integers, groups, dilation), groups)


def size_and_cut(
    size: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
) -> tuple[list[int], list[int], list[int]]:
    """What the kernel computes, which knows no padding, and what of it is the result.

    Args:
        size: Of the input, without batch and channels.
        kernel: Of the dense weight.
        stride: Per axis.
        padding: What torch cuts from either side.
        output_padding: What torch adds at the end.

    Returns:
        Per axis: the size of the kernel's output, where the result starts in it, and where it ends.
    """
    full = [(n - 1) * s + k for n, s, k in zip(size, stride, kernel, strict=True)]
    ends = [n - p + extra for n, p, extra in zip(full, padding, output_padding, strict=True)]
    return [max(n, end) for n, end in zip(full, ends, strict=True)], list(padding), ends
