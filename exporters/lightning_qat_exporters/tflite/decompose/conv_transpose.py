"""Decompose transposed convolutions to what LiteRT's kernels compute.

TRANSPOSE_CONV has no groups and no dilation. Zeros between the integers replace both: the same
sums, of more terms. Its padding differs from torch's, so the output is computed without padding and
then cut.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.arguments import arguments_of, per_axis


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


def dense_scale(qparams: QParams, channels: int) -> Tensor:
    """One scale per output channel, also where the groups share theirs (of an earlier version)."""
    scale = qparams.scale
    return scale if qparams.axis is None else scale.repeat(channels // scale.numel())


def dense_like(integers: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """The dense weight of a shape that has the same integers.

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
    return None if inputs % groups else dense(integers, groups, dilation)


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution that LiteRT's kernels compute, and what of its output is the result.

    Args:
        integers: The weight, ``(in, out, height, width)`` or ``(in, out, depth, height, width)``.
        scale: A scalar, or ``(out,)``.
        stride: Per axis.
        size: Of the kernel's output, per axis; what lies behind the last window holds the bias.
        cuts: Axis, counted from the first after the channels, start and end of what is kept; only
            axes that are cut.
        one_dimensional: The layer has one axis and is computed on a picture of height 1.
    """

    integers: Tensor
    scale: Tensor
    stride: list[int]
    size: list[int]
    cuts: list[tuple[int, int, int]]
    one_dimensional: bool


def conv_transpose(
    node: fx.Node, integers: Tensor, qparams: QParams, size: tuple[int, ...]
) -> TransposedConvolution:
    """Decompose an ``aten.conv_transpose`` to one without groups, dilation and padding, and cuts.

    Args:
        node: The operator.
        integers: Its weight, ``(in, out / groups, *kernel)``.
        qparams: Of the weight.
        size: Of its input, without batch and channels.
    """
    axes, options = len(size), arguments_of(node)[3:]
    groups = options.pop(3)
    stride, padding, output_padding, dilation = (per_axis(value, axes) for value in options)
    integers = dense(integers, groups, dilation)
    full = [(n - 1) * s + k for n, s, k in zip(size, stride, integers.shape[2:], strict=True)]
    ends = [n - p + extra for n, p, extra in zip(full, padding, output_padding, strict=True)]
    whole = [max(n, end) for n, end in zip(full, ends, strict=True)]
    starts = list(padding)
    if axes == 1:
        integers = integers.unsqueeze(2)
        stride, whole, starts, ends = [1, *stride], [1, *whole], [0, *starts], [1, *ends]
    cuts = [
        (axis, start, end)
        for axis, (n, start, end) in enumerate(zip(whole, starts, ends, strict=True))
        if (start, end) != (0, n)
    ]
    scale = dense_scale(qparams, integers.shape[1])
    return TransposedConvolution(integers, scale, stride, whole, cuts, axes == 1)
