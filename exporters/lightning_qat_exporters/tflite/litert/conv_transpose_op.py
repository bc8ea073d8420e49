"""Transposed convolutions in litert-torch: LiteRT's own operator instead of a decomposition.

litert-torch decomposes them to convolutions of flipped weights, which its converter leaves in float
and often cannot express. A torch operator of ours is lowered to LiteRT's operator instead.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_qat_exporters.tflite.flatbuffer.file import kind_of
from lightning_qat_exporters.tflite.litert.private import custom_call

_FUNCTIONS = {4: F.conv_transpose2d, 5: F.conv_transpose3d}


@torch.library.custom_op("lightning_qat_litert::transpose_conv", mutates_args=())
def transpose_conv(
    x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], size: list[int]
) -> Tensor:
    """A transposed convolution in LiteRT's layout.

    Args:
        x: ``(batch, *size, in)`` with two or three axes of size.
        weight: ``(out, height, width, in)``, or ``(depth, height, width, out, in)``.
        bias: ``(out,)``; with three axes zeros, ``(in,)``: litert-torch's converter wants it so,
            LiteRT does not, and ``without_biases`` takes it out of the file.
        stride: Per axis.
        size: Of the output; what lies behind the last window holds the bias alone.
    """
    order = (3, 0, 1, 2) if x.dim() == 4 else (4, 3, 0, 1, 2)
    y = _FUNCTIONS[x.dim()](x.movedim(-1, 1), weight.permute(order), None, stride)
    whole = y.new_zeros(*y.shape[:2], *size)
    whole[tuple(slice(n) for n in y.shape)] = y
    whole = whole.movedim(1, -1).contiguous()
    return whole + bias if x.dim() == 4 else whole


@transpose_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], size: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], *size, weight.shape[0 if x.dim() == 4 else 3])


def lower(context: Any, x: Any, weight: Any, bias: Any, stride: list[int], size: list[int]) -> Any:
    """Lower the operator to LiteRT's, in litert-torch."""
    names = ("stride_d", "stride_h", "stride_w")[-len(stride) :]
    attributes: dict[str, str | int] = {
        "padding": "VALID",
        "fused_activation_function": "NONE",
        **dict(zip(names, stride, strict=True)),
    }
    if len(stride) == 3:
        attributes.update((f"dilation_{axis}_factor", 1) for axis in "dhw")
    kind = "tfl.transpose_conv" if len(stride) == 2 else "tfl.conv_3d_transpose"
    return custom_call(context, kind, [weight, x, bias], attributes)


def without_biases(file: Any) -> None:
    """Remove the biases of CONV_3D_TRANSPOSE from an unpacked file, in place."""
    for operator in file.subgraphs[0].operators:
        if kind_of(file, operator) == "CONV_3D_TRANSPOSE":
            operator.inputs = operator.inputs[:3]
