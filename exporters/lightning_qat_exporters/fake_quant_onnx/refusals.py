"""What a runtime refuses in a converted model, or leaves out of it, said before the file exists."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_qat.export.protocol import Unsupported
from lightning_qat.ir.quantized_model import QuantizedModel
from lightning_qat_exporters.qdq.build import FULL_GRIDS

_EIGHT_BITS = "Train with Recipe(activation=ActivationSpec(bits=8))"
_SYMMETRIC = "Train with Recipe(activation=ActivationSpec(bits=8, symmetric=True))"


def refused_by_openvino(model: QuantizedModel) -> Iterator[Unsupported]:
    """OpenVINO has no 16-bit quantization: it leaves the pairs out and computes in float."""
    for key, tensor in model.tensors.items():
        if tensor.qparams.grid.dtype is torch.int16:
            yield Unsupported(key, "OpenVINO leaves out activations of 16 bits", _EIGHT_BITS)


def refused_by_tensorrt(model: QuantizedModel) -> Iterator[Unsupported]:
    """TensorRT takes INT8 with zero point 0, and nothing between Q and DQ; see ``lint_tensorrt``.

    Yields:
        One problem per activation, with the option of the recipe that solves it.
    """
    for key, tensor in model.tensors.items():
        if tensor.kind == "weight":
            continue
        grid, zero_point = tensor.qparams.grid, tensor.qparams.zero_point
        if grid.dtype is torch.int16:
            yield Unsupported(key, "TensorRT has no 16-bit quantization", _SYMMETRIC)
        elif bool(zero_point.any()):
            reason = f"TensorRT needs zero point 0; got {int(zero_point.flatten()[0])}"
            yield Unsupported(key, reason, _SYMMETRIC)
        elif (grid.qmin, grid.qmax) not in FULL_GRIDS:
            reason = f"TensorRT has no Clip of integers, as {grid.qmin} .. {grid.qmax} needs one"
            yield Unsupported(key, reason, _SYMMETRIC)
