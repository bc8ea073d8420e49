"""Decompose hardsigmoid to ``relu6(x + 3) * (1 / 6)`` with a single rounding of its values.

The sum uses six times the scale of the result, so the multiplication by a sixth is exact.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_qat.numerics.qparams import QParams
from lightning_qat_exporters.tflite.decompose.average_pool import constant
from lightning_qat_exporters.tflite.decompose.builder import Builder, V

TIMES = 6.0
"""The scale of the sum in scales of the result."""


def hardsigmoid(build: Builder[V], x: V, name: str, output: QParams) -> V:
    """Add the operators of a hardsigmoid.

    Args:
        build: The backend's graph.
        x: A quantized tensor.
        name: Prefix of the constants' keys.
        output: Scale and zero point of the result.
    """
    largest = torch.tensor([127], dtype=torch.int8)
    three = build.constant(constant(f"{name}.three", largest, 3 / 127))
    sixth = build.constant(constant(f"{name}.sixth", largest, 1 / 6 / 127))
    coarse = replace(output, scale=torch.tensor(float(output.scale) * TIMES))
    return build.binary("mul", build.binary("add", x, three, coarse, "relu6"), sixth, output)
